"""Windowed cross-attention on NVIDIA GPUs where the heads share the keys, and the keys are the values.

The kernel is bound by memory traffic, so it reads everything once. A persistent block keeps the features of its G
windows in shared memory between the two products (55 KB per window at width 3072). Queries and results stream past
them.

    producer warpgroup     It copies queries by TMA, 64 columns at a time, into a ring of stages, and features into the
                           buffer. It runs ahead into the next group of windows while results of this one are written.
    consumer warpgroups    They compute logits = queries . features, the softmax in registers, and
                           results = weights . features, which are written by TMA.

On tensor cores (bfloat16, Hopper) 64 rows (window, head) are multiplied with 64 keys. Each row owns S of these keys,
and the others are masked. The buffer holds `stride` < 64 keys per chunk of columns, one chunk behind the other, so an
operand of 64 keys extends into the next chunks. What it reads there are finite numbers, whose weights are zero or whose
logits are masked. For float32 and on other chips the products are vector arithmetic: a group is one window, and the
heads are divided over the consumers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention._gpu_block import Block, Ref, Shared, each
from vr_jax.kernels.window_attention._gpu_consumers import consume_by_vectors, consume_on_tensor_cores
from vr_jax.kernels.window_attention._gpu_plan import SWIZZLED_ROWS, TILE, Plan


def call(
    plan: Plan,
    query: Float[Array, "W H d"],
    features: Float[Array, "W S 1 d"],
    valid: Bool[Array, "W S"] | None,
    grad: Float[Array, "W H d"] | None,
    scale: float,
    blocks: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs the kernel on one device.

    Args:
        plan: The sizes of the call.
        query: The queries.
        features: The keys, which are the values.
        valid: The keys that take part, or None if all do.
        grad: The gradient by the output, or None in the forward pass.
        scale: The factor of the logits.
        blocks: The blocks that run on the device at the same time.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The output alone; or with `grad` the three results of `pallas_gpu.query_gradient`.
    """
    shape, dtype = query.shape, query.dtype
    flat = features.reshape(-1, plan.width)
    # This copies nothing if the rows are whole tiles, as they are for any number of windows that is a multiple of 8.
    flat = jnp.pad(flat, ((0, -flat.shape[0] % plan.align), (0, 0)))
    streams = [x.reshape(-1, plan.width) for x in (query, grad) if x is not None]
    mask_logits = [] if valid is None else [_mask_logits(plan, valid)]

    out_type = [jax.ShapeDtypeStruct(streams[0].shape, dtype)]
    if plan.backward:
        out_type += [jax.ShapeDtypeStruct((plan.groups, *plan.weights), jnp.float32)] * 2

    tiles: tuple[Any, ...] = ()
    if plan.tensor_cores:
        # The type is Any because mypy takes methods that the base class leaves empty for abstract ones.
        tiling: Any = plgpu.TilingTransform
        swizzle: Any = plgpu.SwizzleTransform
        tiles = tiling((SWIZZLED_ROWS, TILE)), swizzle(128)
    results = (plan.consumers, TILE) if plan.tensor_cores else (1, plan.heads)
    scratch: dict[str, Any] = {
        "ring": plgpu.SMEM((plan.streams, plan.ring_rows, plan.chunk), dtype, transforms=tiles),
        "buffer": plgpu.SMEM((plan.buffer_rows(), plan.chunk), dtype, transforms=tiles),
        "results": plgpu.SMEM((*results, plan.chunk), dtype, transforms=tiles),
        "ring_full": plgpu.Barrier(num_arrivals=plan.streams, num_barriers=plan.stages),
        "ring_free": plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
        "buffer_full": plgpu.Barrier(num_arrivals=plan.per_part, num_barriers=plan.parts),
        "buffer_free": plgpu.Barrier(num_arrivals=1 if plan.tensor_cores else plan.consumers, num_barriers=plan.parts),
    }
    if plan.tensor_cores:
        scratch["factors"] = plgpu.SMEM((TILE, TILE), dtype, transforms=tiles)
        scratch["factors_done"] = plgpu.Barrier(num_arrivals=plan.consumers)
    if plan.backward:
        scratch["weights"] = plgpu.SMEM((2, *plan.weights), jnp.float32)

    # Mosaic's search for layouts does not end for vector arithmetic, which states all its layouts itself.
    semantics = plgpu.LoweringSemantics.Warpgroup if plan.tensor_cores else plgpu.LoweringSemantics.Lane
    outs = plgpu.kernel(
        functools.partial(_body, plan, valid is not None, scale),
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(blocks, plan.groups),),
        grid_names=("block",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=semantics),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="window_attention_absorbed_" + ("gradient" if plan.backward else "forward"),
    )(*streams, flat, *mask_logits)
    out, *weights = outs
    return out.reshape(shape), *(_by_window(plan, w) for w in weights)


def _mask_logits(plan: Plan, valid: Bool[Array, "W S"]) -> Float[Array, "groups keys"]:
    """Returns 0 or -inf for each row of features that a group loads; rows of other groups are masked elsewhere."""
    mask_logits = jnp.where(valid, 0.0, -jnp.inf).astype(jnp.float32).reshape(-1)
    if not plan.tensor_cores:
        return mask_logits.reshape(-1, plan.keys)
    first = np.arange(plan.groups) * plan.group * plan.keys // plan.align * plan.align
    index = np.minimum(first[:, None] + np.arange(TILE), mask_logits.size - 1)
    return mask_logits[index]


def _by_window(plan: Plan, weights: Float[Array, "groups parts S rows"]) -> Float[Array, "W H S"]:
    """Returns the weights of all groups by window."""
    weights = weights.swapaxes(1, 2).reshape(plan.groups, plan.keys, -1)[..., : plan.rows]
    weights = weights.reshape(plan.groups, plan.keys, plan.group, plan.heads)
    return weights.transpose(0, 2, 3, 1).reshape(-1, plan.heads, plan.keys)[: plan.windows]


def _body(plan: Plan, masked: bool, scale: float, *refs: Ref, **scratch: Ref) -> None:
    """Runs one warpgroup of a block: the last one produces, the others consume."""
    left = list(refs)
    streams = [left.pop(0) for _ in range(plan.streams)]
    features = left.pop(0)
    mask_logits = left.pop(0) if masked else None
    out, *weights = left
    warpgroup, first, step = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    block = Block(plan, scale, streams, features, mask_logits, out, weights, warpgroup, first, step)
    shared = Shared(**scratch)

    @pl.when(warpgroup == plan.consumers)
    def _produces() -> None:
        _produce(block, shared)

    @pl.when(warpgroup < plan.consumers)
    def _consumes() -> None:
        consume = consume_on_tensor_cores if plan.tensor_cores else consume_by_vectors
        consume(block, shared)
        plgpu.wait_smem_to_gmem(0)


def _produce(block: Block, shared: Shared) -> None:
    """Copies queries and features into shared memory as their places become free."""
    plan = block.plan

    def load_queries(turn: Array, chunk: Array) -> None:
        slot = block.slot(turn, chunk)
        plgpu.barrier_wait(shared.ring_free.at[slot])
        rows = pl.ds(block.group(turn) * plan.rows, plan.rows)
        for n, stream in enumerate(block.streams):
            plgpu.copy_gmem_to_smem(
                stream.at[rows, block.columns(chunk)],
                shared.ring.at[n, pl.ds(slot * plan.rows, plan.rows)],
                shared.ring_full.at[slot],
            )

    def load_features(turn: Array, part: Array) -> None:
        plgpu.barrier_wait(shared.buffer_free.at[part])
        row = lax.div(block.group(turn) * (plan.group * plan.keys), plan.align) * plan.align
        for n in range(plan.per_part):
            chunk = part * plan.per_part + n
            plgpu.copy_gmem_to_smem(
                block.features.at[pl.ds(row, plan.stride()), block.columns(chunk)],
                shared.buffer.at[pl.ds(chunk * plan.stride(), plan.stride())],
                shared.buffer_full.at[part],
            )

    ahead = min(plan.stages, plan.chunks)

    @pl.loop(0, block.turns)
    def _turn(turn: Array) -> None:
        # First come as many queries as the ring holds, then the features as their buffer empties, then the rest of the
        # queries as they are read. So the next group is copied while the consumers write results.
        pl.loop(0, ahead)(functools.partial(load_queries, turn))
        pl.loop(0, plan.parts)(functools.partial(load_features, turn))
        pl.loop(ahead, plan.chunks)(functools.partial(load_queries, turn))

    each(shared.ring_free, plan.stages, plgpu.barrier_wait)
    each(shared.buffer_free, plan.parts, plgpu.barrier_wait)
