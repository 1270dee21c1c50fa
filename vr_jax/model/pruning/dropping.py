"""The steps that pruners share: choosing the strongest tokens, dropping by a mask, and closing the gaps.

Rows are independent and hold one segment each, as in generation. Every shape is static: a dropped token becomes padding
(segment 0), and rows are cut to a shorter length that the caller knows beforehand to hold the kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.sharding import constrain


def vision_tokens(batch: Batch) -> Bool[Array, "B N"]:
    """The mask of the tokens that may be dropped: cells of images, and newlines, which compete with them."""
    return (batch.vision_cell >= 0) | (batch.vision_cell == NEWLINE)


def strongest(
    score: Float[Array, "B N"], candidates: Bool[Array, "B N"], count: Int[Array, " B"]
) -> Bool[Array, "B N"]:
    """The mask of the `count` candidates of each row with the highest scores; of equal ones, the first."""
    order = jnp.argsort(jnp.where(candidates, -score, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return candidates & (rank < count[:, None])


def counts(count: Callable[[int], int], total: Int[Array, " B"], largest: int) -> Int[Array, " B"]:
    """The number of tokens that each row keeps.

    Args:
        count: Maps a row's number of vision tokens to the number that is kept. It is tabulated, so that it may compute
            with Python's float64 numbers.
        total: The number of vision tokens of each row.
        largest: The largest such number.

    Returns:
        `count` of each `total`.
    """
    return jnp.asarray(np.array([count(n) for n in range(largest + 1)], np.int32))[total]


def drop(inputs: DecoderInputs, keep: Bool[Array, "B N"], *, renumber: bool) -> DecoderInputs:
    """Turns the tokens outside the mask `keep` into padding.

    With `renumber` the others get the positions 0, 1, ...; without it they keep theirs.
    """
    segments = jnp.where(keep, inputs.segment_ids, 0)
    if not renumber:
        return inputs.replace(segment_ids=segments)
    positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1, dtype=inputs.positions.dtype) - 1, 0)
    return inputs.replace(segment_ids=segments, positions=positions)


def row_length(lengths: tuple[int, ...] | None, stage: int) -> int | None:
    """The length of the rows of a stage; None where rows keep their length, as they do before the final norm."""
    return None if lengths is None or stage == len(lengths) else lengths[stage]


def compact[Tree](tree: Tree, used: Bool[Array, "B N"], length: int | None) -> Tree:
    """Cuts rows to `length` slots, moving the used slots to the right in order.

    Args:
        tree: Arrays (B, N, ...).
        used: The mask of the used slots.
        length: The new length, which must hold every row's used slots; None leaves the arrays as they are.

    Returns:
        The tree with arrays (B, length, ...).
    """
    if length is None or length == used.shape[1]:
        return tree
    order = jnp.argsort(used, axis=1, stable=True)[:, -length:]
    shorter: Tree = jax.tree.map(lambda array: _take(array, order), tree)
    return shorter


def _take(array: Array, index: Int[Array, "B M"]) -> Array:
    """array[b, index[b]] of every row."""
    taken = jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)
    return constrain(taken, "batch", *(None,) * (array.ndim - 1))
