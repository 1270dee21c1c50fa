"""Vector arithmetic of the Mosaic GPU kernels, with rows (heads) over the lanes and the keys in a list."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)
# The lowest maximum of logits. It is above -inf, so that a window without a valid key gives no NaN.
LOWEST = -1e30
# Rows that a warpgroup holds side by side.
ROWS = 8
# Lanes along a row.
LANES = 16
# Bytes of one load of a lane, at most.
VECTOR_BYTES = 16


def vector_size(width: int, dtype: DTypeLike) -> int:
    """Returns the elements of a row that a lane loads at once, or 0 if the width cannot be divided so."""
    size = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    while size and width % (LANES * size):
        size //= 2
    return size


def row_layout(width: int, dtype: DTypeLike) -> Any:
    """Returns the layout of (rows, width) with 16 lanes along a row and 8 rows in a warpgroup.

    Sums over a row then stay within a warp.
    """
    size = vector_size(width, dtype)
    tiling = plgpu.Tiling(((ROWS, LANES * size), (2, LANES * size), (size,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def reciprocal(total: Array) -> Array:
    """Returns 1 / total, and 0 where the total is 0."""
    return jnp.where(total > 0, 1 / total, 0.0)


def softmax(logits: list[Float[Array, " rows"]], mask_logits: list[Array] | None, scale: float) -> list[Array]:
    """Computes the softmax over the list.

    Args:
        logits: The logits of each key, before `scale`.
        mask_logits: For each key a scalar that is added to its logits: 0, or -inf for a key that is not valid.
        scale: The factor of the logits.
    """
    logits = [logit * (scale * LOG2_E) for logit in logits]
    if mask_logits is not None:
        logits = [logit + shift for logit, shift in zip(logits, mask_logits, strict=True)]
    highest = jnp.full_like(logits[0], LOWEST)
    for logit in logits:
        highest = jnp.maximum(highest, logit)
    weights = [jnp.exp2(logit - highest) for logit in logits]
    share = reciprocal(sum(weights[1:], weights[0]))
    return [weight * share for weight in weights]


def logits_gradient(weights: list[Array], weights_grad: list[Array], scale: float) -> list[Array]:
    """Computes the gradient by the products before `scale`, from the weights and the gradient by the weights."""
    delta = sum(w * g for w, g in zip(weights[1:], weights_grad[1:], strict=True)) + weights[0] * weights_grad[0]
    return [w * (g - delta) * scale for w, g in zip(weights, weights_grad, strict=True)]


def broadcast(x: Array, shape: tuple[int, int], axis: int, layout: Any) -> Array:
    """Returns a matrix that repeats a vector, which lies along `axis`, along the other axis."""
    matrix: Array = plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), layout)
    return matrix
