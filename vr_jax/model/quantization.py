"""Kernels of linear layers in 8 or 4 bits: how they are stored, and the matrix product with them.

A quantised kernel (in, out) is two arrays:

| kind | codes | scales (float32) | value |
|---|---|---|---|
| `int8` | int8, (in, out) | (1, out): one for each output channel | code * scale |
| `nf4` | uint8, (in / 2, out): two input channels in one byte | (in / block, out) | NF4[code] * scale |

The codes are those of qwix (`qwix.quantize`), which is imported only where something is quantised. NF4 is the code book
of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, Appendix E), and a block is 64 input channels of one output channel,
as in bitsandbytes, or the largest even divisor of `in` below that. Kernels may have further leading axes, of stacked
layers.

Two things are not left to qwix. It stores NF4 codes as uint4, which JAX keeps in a byte each on the host and in
checkpoints; here two of them share a byte. And its `dequantize` looks the code book up in the flattened array: on a
mesh that cuts both axes of a kernel, XLA then sends the codes of whole rows, and the values of the whole kernel in
float32, to every device. Here the look-up keeps the axes, so that a cut kernel stays cut.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from vr_jax.errors import UserError
from vr_jax.sharding import gather_kernel

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")
BLOCK = 64  # input channels that share a scale, at most
# The scale is the largest value over 127, as in bitsandbytes. qwix divides by 127.5, so that the largest value lies in
# the middle of two codes.
_ABSMAX = f"absmax,{127.5 / 127}"
# qwix `_src/core/numerics.py`, get_nf4_buckets; bitsandbytes `functional.py`, get_4bit_type("nf4").
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_block(inputs: int) -> int | None:
    """Returns how many input channels share a scale; None where the kernel cannot be stored in pairs of codes."""
    return next((size for size in range(BLOCK, 0, -2) if inputs % size == 0), None)


def quantised_structs(shape: tuple[int, ...], kind: Kind) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns shape and type of the codes and the scales of a kernel.

    Args:
        shape: Shape of the kernel, (..., in, out).
        kind: How it is stored; `nf4` needs an even number of input channels.
    """
    *lead, inputs, outputs = shape
    if kind == "int8":
        return (
            jax.ShapeDtypeStruct(shape, jnp.int8),
            jax.ShapeDtypeStruct((*lead, 1, outputs), jnp.float32),
        )
    block = nf4_block(inputs)
    assert block is not None
    return (
        jax.ShapeDtypeStruct((*lead, inputs // 2, outputs), jnp.uint8),
        jax.ShapeDtypeStruct((*lead, inputs // block, outputs), jnp.float32),
    )


def import_qwix() -> Any:
    """Returns the library that quantises.

    Raises:
        UserError: It is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            f"weights in int8 or nf4 need qwix ({error}): pip install 'vr-jax[lora]', or keep them in bfloat16"
        ) from None
    return qwix


def quantise(kernel: Float[Array, "*L I O"], kind: Kind) -> tuple[Shaped[Array, "*L J O"], Float[Array, "*L S O"]]:
    """Quantises a kernel. The function can be jitted; layers are taken one after another.

    Args:
        kernel: The kernel, with leading axes where layers are stacked.
        kind: How it is stored.

    Returns:
        Its codes and its scales.

    Raises:
        UserError: qwix is not installed.
    """
    qwix = import_qwix()

    def one(matrix: Float[Array, "I O"]) -> tuple[Array, Array]:
        matrix = matrix.astype(jnp.float32)
        if kind == "int8":
            stored = qwix.quantize(matrix, jnp.int8, channelwise_axes=(1,), calibration_method=_ABSMAX)
            return stored.qvalue, stored.scale
        stored = qwix.quantize(matrix, "nf4", channelwise_axes=(1,), tiled_axes={0: nf4_block(matrix.shape[0])})
        pairs = stored.qvalue.astype(jnp.uint8).reshape(-1, 2, matrix.shape[1])
        return pairs[:, 0] | (pairs[:, 1] << 4), stored.scale

    lead = kernel.shape[:-2]
    if not lead:
        return one(kernel)
    codes, scales = jax.lax.map(one, kernel.reshape(-1, *kernel.shape[-2:]))
    return codes.reshape(*lead, *codes.shape[1:]), scales.reshape(*lead, *scales.shape[1:])


def dequantise(
    codes: Shaped[Array, "*L J O"], scales: Float[Array, "*L S O"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*L I O"]:
    """Returns the kernel that codes and scales stand for, computed in float32 and rounded once.

    Args:
        codes: The codes; their type tells the kind.
        scales: The scales.
        dtype: Type of the result.
    """
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scales).astype(dtype)
    *lead, half, outputs = codes.shape
    # A shift that is broadcast is work for each element alone, which the compiler joins with what follows.
    nibbles = (codes[..., :, None, :] >> jnp.asarray([[0], [4]], jnp.uint8)) & 15
    blocks = _nf4_values(nibbles).reshape(*lead, scales.shape[-2], -1, outputs)
    return (blocks * scales[..., :, None, :]).reshape(*lead, 2 * half, outputs).astype(dtype)


def _nf4_values(codes: Shaped[Array, "*B"]) -> Float[Array, "*B"]:
    """The values of the code book.

    It is one look-up. A choice by bits would be several steps, whose values XLA keeps as arrays of their own on GPUs: 7
    GiB of them in the update of configs/qlora_qwen2_7b.py.
    """
    values: Array = jnp.asarray(NF4, jnp.float32).at[codes].get(mode="promise_in_bounds")
    return values


Axes = tuple[str | None, str | None]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantised_product(
    x: Float[Array, "*B I"], codes: Shaped[Array, "J O"], scales: Float[Array, "S O"], axes: Axes = (None, None)
) -> Float[Array, "*B O"]:
    """Returns the product of vectors with a quantised kernel.

    The backward pass keeps the codes and computes the kernel again, so that no more than one layer's kernel exists at a
    time, whatever the model recomputes otherwise. Codes and scales have no gradient.

    Args:
        x: Vectors, in the type of the computation.
        codes: The codes of the kernel.
        scales: Its scales.
        axes: How the kernel is cut while it is multiplied with. The codes are gathered to that, not the values.
    """
    return x @ _gathered(codes, scales, axes, x.dtype)


def _gathered(codes: Array, scales: Array, axes: Axes, dtype: DTypeLike) -> Array:
    kernel = dequantise(gather_kernel(codes, axes), gather_kernel(scales, axes), dtype)
    return gather_kernel(kernel, axes)


def _forward(x: Array, codes: Array, scales: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    return quantised_product(x, codes, scales, axes), (codes, scales)


def _backward(axes: Axes, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    return gradient @ _gathered(*kept, axes, gradient.dtype).T, None, None


quantised_product.defvjp(_forward, _backward)
