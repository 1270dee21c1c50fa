"""Windowed cross-attention on NVIDIA GPUs since Hopper, a Mosaic GPU kernel that reads queries, keys and values once.

There are two kernels. `_gpu_absorbed.py` has the one for keys that the heads share (K = 1, the absorbed form). This
module has the one for heads with their own keys (K = H, the plain form). There no data is used twice, so a block takes
one window and eight heads, lets the copy engine bring all it needs at once, and computes with vector instructions. The
other blocks on the multiprocessor hide the latency.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention import _gpu_absorbed as absorbed
from vr_jax.kernels.window_attention import _gpu_vectors as vectors
from vr_jax.kernels.window_attention._gpu_plan import SMEM_BYTES, Plan
from vr_jax.kernels.window_attention._gpu_plan import unsupported as does_not_fit
from vr_jax.kernels.window_attention.vjp import ArrayOrShape, dtype_refusal

# A reference to memory. Pallas has no public name for its type.
Ref = Any
# The multiprocessors of an H100 or H200, which are assumed where a program is compiled without a device.
MULTIPROCESSORS = 132
# The elements that a TMA copy takes along one axis, at most.
MAX_WIDTH = 256


def unsupported(query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape) -> str | None:
    """Returns why this kernel cannot run on these arrays (or shapes and types) of one device, or None if it can."""
    if (reason := dtype_refusal(query, key, value)) is not None:
        return reason
    capability = compute_capability()
    if capability is not None and capability < (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}, expected Hopper (9.0) or newer"
    if query.shape[-1] != value.shape[-1]:
        return f"query width {query.shape[-1]} and value width {value.shape[-1]} differ"
    if not all((*query.shape, key.shape[1])):
        return f"an empty array among query {tuple(query.shape)} and key {tuple(key.shape)}"
    if key.shape[2] == 1:
        if key is not value:
            return "keys that the heads share but that are not the values (pass one array as both)"
        return does_not_fit(plan_for(query, key, False)) or does_not_fit(plan_for(query, key, True))
    _, heads, width = query.shape
    if heads % vectors.ROWS:
        return f"{heads} heads, expected a multiple of {vectors.ROWS}"
    if width > MAX_WIDTH or not vectors.vector_size(width, query.dtype):
        return f"head width {width}, expected a multiple of {vectors.LANES} up to {MAX_WIDTH}"
    # The 4096 bytes are for weights and alignment.
    needed = (2 * key.shape[1] + 3) * vectors.ROWS * width * query.dtype.itemsize + 4096
    if needed > SMEM_BYTES:
        return f"{key.shape[1]} keys need {needed} bytes of shared memory, a block has {SMEM_BYTES}"
    return None


def forward(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K d"],
    valid: Bool[Array, "W S"] | None,
    scale: float,
    *,
    interpret: bool,
) -> Float[Array, "W H d"]:
    """Computes windowed cross-attention on one device.

    Args:
        query: One query for each of W windows, in H heads.
        key: The keys, with K = H or K = 1.
        value: The values; the same array as `key` if the keys are the values.
        valid: The keys that take part, or None if all do.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The attended values. A key or value that is not finite may also reach other windows of the same block.
    """
    if key.shape[2] == 1:
        plan = plan_for(query, key, backward=False)
        (out,) = absorbed.call(plan, query, key, valid, None, scale, _multiprocessors(), interpret)
    else:
        (out,) = _plain(query, key, value, valid, None, scale, interpret)
    return out


def query_gradient(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K d"],
    valid: Bool[Array, "W S"] | None,
    grad: Float[Array, "W H d"],
    scale: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "W H d"], Float[Array, "W H S"], Float[Array, "W H S"]]:
    """Computes the gradient by the query, and what the gradients of keys and values need.

    Args:
        query: One query for each of W windows, in H heads.
        key: The keys, with K = H or K = 1.
        value: The values; the same array as `key` if the keys are the values.
        valid: The keys that take part, or None if all do.
        grad: The gradient by the output.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The gradient by the query; the weights; and the gradient by the products query . key, before `scale`.
    """
    if key.shape[2] == 1:
        plan = plan_for(query, key, backward=True)
        outs = absorbed.call(plan, query, key, valid, grad, scale, _multiprocessors(), interpret)
    else:
        outs = _plain(query, key, value, valid, grad, scale, interpret)
    query_grad, weights, logits_grad = outs
    return query_grad, weights, logits_grad


def plan_for(query: ArrayOrShape, key: ArrayOrShape, backward: bool) -> Plan:
    """Returns how the absorbed kernel divides these arrays, or shapes and types."""
    windows, heads, width = query.shape
    dtype = jnp.dtype(query.dtype)
    capability = compute_capability() or (9, 0)
    # The instruction wgmma exists on Hopper only, and rounds float32 to 10 bits.
    tensor_cores = dtype == jnp.bfloat16 and capability[0] == 9
    return Plan(windows, heads, key.shape[1], width, dtype, backward, tensor_cores)


def _device() -> jax.Device | None:
    """Returns a GPU of this process, if it has any."""
    return jax.devices()[0] if jax.default_backend() == "gpu" else None


def compute_capability() -> tuple[int, ...] | None:
    """Returns the compute capability of this process's GPU, or None without one."""
    capability = getattr(_device(), "compute_capability", None)
    return None if capability is None else tuple(int(part) for part in str(capability).split("."))


def _multiprocessors() -> int:
    count: int = getattr(_device(), "core_count", MULTIPROCESSORS)
    return count


def _plain(
    query: Array, key: Array, value: Array, valid: Array | None, grad: Array | None, scale: float, interpret: bool
) -> tuple[Array, ...]:
    """Runs the plain kernel; returns (out,), or with `grad` the three results of `query_gradient`."""
    windows, heads, width = query.shape
    keys = key.shape[1]
    blocks = heads // vectors.ROWS
    dtype = query.dtype
    inputs = [query, key, value] + ([] if grad is None else [grad])
    if valid is not None:
        inputs.append(jnp.where(valid, 0.0, -jnp.inf).astype(jnp.float32))

    weights = (keys, vectors.ROWS)
    out_type = [jax.ShapeDtypeStruct(query.shape, dtype)]
    scratch: dict[str, Any] = {
        "query_smem": plgpu.SMEM((vectors.ROWS, width), dtype),
        "key_smem": plgpu.SMEM((keys, vectors.ROWS, width), dtype),
        "value_smem": plgpu.SMEM((keys, vectors.ROWS, width), dtype),
        "result": plgpu.SMEM((vectors.ROWS, width), dtype),
        "logits_ready": plgpu.Barrier(num_arrivals=2),
        "values_ready": plgpu.Barrier(num_arrivals=1 if grad is None else 2),
    }
    if grad is not None:
        out_type += [jax.ShapeDtypeStruct((windows, blocks, *weights), jnp.float32)] * 2
        scratch["grad_smem"] = plgpu.SMEM((vectors.ROWS, width), dtype)
        scratch["weights_smem"] = plgpu.SMEM((2, *weights), jnp.float32)

    outs = plgpu.kernel(
        functools.partial(_plain_body, keys, blocks, grad is not None, valid is not None, scale),
        out_type=out_type,
        scratch_types=scratch,
        grid=(windows * blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="window_attention_plain_" + ("forward" if grad is None else "gradient"),
    )(*inputs)
    out, *rest = outs
    return out, *(w.swapaxes(2, 3).reshape(windows, heads, keys) for w in rest)


def _plain_body(
    keys: int,
    blocks: int,
    backward: bool,
    masked: bool,
    scale: float,
    *refs: Ref,
    query_smem: Ref,
    key_smem: Ref,
    value_smem: Ref,
    result: Ref,
    logits_ready: Ref,
    values_ready: Ref,
    grad_smem: Ref = None,
    weights_smem: Ref = None,
) -> None:
    inputs, outs = list(refs[: 3 + backward + masked]), refs[3 + backward + masked :]
    query, key, value = inputs[:3]
    index = lax.axis_index("block")
    window, block = lax.div(index, blocks), lax.rem(index, blocks)
    heads = pl.ds(block * vectors.ROWS, vectors.ROWS)
    layout = vectors.row_layout(query.shape[-1], query.dtype)

    plgpu.copy_gmem_to_smem(query.at[window, heads], query_smem, logits_ready)
    plgpu.copy_gmem_to_smem(key.at[window, :, heads], key_smem, logits_ready)
    plgpu.copy_gmem_to_smem(value.at[window, :, heads], value_smem, values_ready)
    if backward:
        plgpu.copy_gmem_to_smem(inputs[3].at[window, heads], grad_smem, values_ready)

    def load(ref: Ref) -> Array:
        return plgpu.load(ref, layout=layout).astype(jnp.float32)

    def products(rows: Ref, others: Ref) -> list[Array]:
        rows = load(rows)
        return [(rows * load(others.at[n])).sum(axis=1) for n in range(keys)]

    shifts = [inputs[-1][window, n] for n in range(keys)] if masked else None
    plgpu.barrier_wait(logits_ready)
    weights = vectors.softmax(products(query_smem, key_smem), shifts, scale)
    plgpu.barrier_wait(values_ready)
    factors, rows = weights, value_smem
    if backward:
        factors, rows = vectors.logits_gradient(weights, products(grad_smem, value_smem), scale), key_smem
        for n, columns in enumerate((weights, factors)):
            for k, column in enumerate(columns):
                weights_smem[n, k] = column
    terms = [vectors.broadcast(f, result.shape, 0, layout) * load(rows.at[n]) for n, f in enumerate(factors)]
    result[...] = sum(terms[1:], terms[0]).astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, outs[0].at[window, heads])
    if backward:
        for n, ref in enumerate(outs[1:]):
            plgpu.copy_smem_to_gmem(weights_smem.at[n], ref.at[window, block])
    plgpu.wait_smem_to_gmem(0)
