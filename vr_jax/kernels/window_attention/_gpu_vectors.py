"""Vector arithmetic that the Mosaic GPU kernels share: rows (heads) over the lanes, the S keys a list in registers."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # above -inf, so that a window whose keys are all hidden has no NaN
ROWS = 8  # that a warpgroup holds side by side
LANES = 16  # along a row
VECTOR_BYTES = 16  # at most, of one load


def vector_size(width: int, dtype: DTypeLike) -> int:
    """Elements of a row that a lane loads at once; 0 where the width cannot be cut so."""
    size = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    while size and width % (LANES * size):
        size //= 2
    return size


def row_layout(width: int, dtype: DTypeLike) -> Any:
    """Of (rows, width): 16 lanes along a row, 8 rows in a warpgroup, so that sums over a row stay within a warp."""
    size = vector_size(width, dtype)
    tiling = plgpu.Tiling(((ROWS, LANES * size), (2, LANES * size), (size,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def reciprocal(total: Array) -> Array:
    """0 where there is nothing to divide by."""
    return jnp.where(total > 0, 1 / total, 0.0)


def softmax(logits: list[Float[Array, " rows"]], hidden: list[Array] | None, scale: float) -> list[Array]:
    """Over the list. hidden: scalars, 0 or -inf."""
    logits = [logit * (scale * LOG2_E) for logit in logits]
    if hidden is not None:
        logits = [logit + shift for logit, shift in zip(logits, hidden, strict=True)]
    highest = jnp.full_like(logits[0], LOWEST)
    for logit in logits:
        highest = jnp.maximum(highest, logit)
    weights = [jnp.exp2(logit - highest) for logit in logits]
    share = reciprocal(sum(weights[1:], weights[0]))
    return [weight * share for weight in weights]


def logits_gradient(weights: list[Array], weights_grad: list[Array], scale: float) -> list[Array]:
    """Gradient by the products before `scale`, from the weights and the gradient by them."""
    mean = sum(w * g for w, g in zip(weights[1:], weights_grad[1:], strict=True)) + weights[0] * weights_grad[0]
    return [w * (g - mean) * scale for w, g in zip(weights, weights_grad, strict=True)]


def spread(x: Array, shape: tuple[int, int], axis: int, layout: Any) -> Array:
    """A vector along `axis` of a matrix, repeated along the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), layout)
