"""Multi-scale deformable attention, in which each query reads a few sampled points of every feature map.

Source: fundamentalvision/Deformable-DETR `models/ops/modules/ms_deform_attn.py` (`MSDeformAttn`) and
`models/ops/functions/ms_deform_attn_func.py` (`ms_deform_attn_core_pytorch`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.model.layers import linear, merge_heads, split_heads, xavier

# Rows and columns of each level's map.
Shapes = Sequence[tuple[int, int]]


def sampling_locations(
    reference: Float[Array, "#N Q L R"], offsets: Float[Array, "N Q H L P 2"], shapes: Shapes
) -> Float[Array, "N Q H L P 2"]:
    """The sampled points (x, y) in units of the map: 0 is its left or top edge, 1 its right or bottom edge.

    Args:
        reference: With R = 2, reference points (x, y). With R = 4, boxes (x, y, width, height) around their centre.
        offsets: Offsets of P points per head and level. From a reference point they count in patches, from a box in
            P-ths of half its size.
        shapes: Rows and columns of each level's map.
    """
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        size = jnp.asarray([(columns, rows) for rows, columns in shapes], offsets.dtype)
        return centre + offsets / size[:, None, :]
    return centre + offsets / offsets.shape[-2] * reference[:, :, None, :, None, 2:] * 0.5


def sample(
    value: Float[Array, "N M H d"],
    shapes: Shapes,
    locations: Float[Array, "N Q H L P 2"],
    weights: Float[Array, "N Q H L P"],
) -> Float[Array, "N Q H d"]:
    """The weighted sum of bilinearly sampled points.

    It samples as torch's grid_sample does with zeros outside and align_corners=False.

    Args:
        value: M patches of all levels, one level after the other, each in raster order.
        shapes: Rows and columns of each level's map.
        locations: The points, see `sampling_locations`.
        weights: The weight of each point.
    """
    count, _, heads, _ = value.shape
    rows, columns = (np.asarray(side, np.int32)[:, None] for side in zip(*shapes, strict=True))
    start = np.cumsum([0, *(math.prod(shape) for shape in shapes)], dtype=np.int32)[:-1, None]
    # Centres of patches are whole numbers. A bfloat16 has too few digits for them, so they are always float32.
    x, y = (locations[..., i].astype(jnp.float32) * side - 0.5 for i, side in ((0, columns), (1, rows)))
    left, top = jnp.floor(x), jnp.floor(y)
    index: list[Array] = []
    share: list[Array] = []
    for right, down in itertools.product((0, 1), repeat=2):
        column, row = left + right, top + down
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        bilinear = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
        at = jnp.clip(row, 0, rows - 1) * columns + jnp.clip(column, 0, columns - 1)
        index.append(at.astype(jnp.int32) + start)
        share.append(jnp.where(inside, bilinear, 0) * weights)

    def per_head(corners: list[Array]) -> Array:
        """Joins the corners of all points of a query to (N, H, Q, levels * points * 4)."""
        stacked = jnp.stack(corners, axis=-1)
        return stacked.reshape(*stacked.shape[:3], -1).swapaxes(1, 2)

    points, shares = per_head(index), per_head(share)
    taken = jnp.take_along_axis(value.swapaxes(1, 2), points.reshape(count, heads, -1, 1), axis=2)
    taken = taken.reshape(*points.shape, -1)
    return jnp.einsum("nhqp,nhqpd->nqhd", shares.astype(value.dtype), taken)


class DeformableAttention(nnx.Module):
    """`MSDeformAttn` with its initial values: each head looks in a direction of its own, at distances 1, 2, ..."""

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        levels: int,
        points: int,
        *,
        out_init: Initializer | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the projections.

        Args:
            width: Channels of queries and features.
            out_width: Channels of the output.
            heads: Attention heads.
            levels: Number of feature maps.
            points: Sampled points per head and level.
            out_init: Initialiser of the output's kernel; None is Xavier-uniform, as in the original.
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        make = functools.partial(linear, width, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros
        count = heads * levels * points
        self.offsets = make(2 * count, init=zeros, bias_init=lambda *_, **__: _ring(heads, levels, points))
        self.weights = make(count, init=zeros)
        self.value = make(width, init=xavier)
        self.output = make(out_width, init=out_init or xavier)
        self.heads, self.levels, self.points = heads, levels, points

    def attend(
        self,
        query: Float[Array, "N Q E"],
        reference: Float[Array, "#N Q L R"],
        features: Float[Array, "N M E"],
        shapes: Shapes,
        padding: Bool[Array, "N M"] | None = None,
    ) -> Float[Array, "N Q O"]:
        """The result of the attention.

        Args:
            query: Q queries.
            reference: The reference point or box of each query on each level, see `sampling_locations`.
            features: The patches of all levels, one level after the other, each in raster order.
            shapes: Rows and columns of each level's map.
            padding: True for patches that count as zero; None where there are none.
        """
        value = self.value(features)
        if padding is not None:
            value = jnp.where(padding[..., None], 0, value)
        return self.read(query, reference, value, shapes)

    def read(
        self,
        query: Float[Array, "N Q E"],
        reference: Float[Array, "#N Q L R"],
        value: Float[Array, "N M E"],
        shapes: Shapes,
    ) -> Float[Array, "N Q O"]:
        """Does what `attend` does, from projected values on."""
        locations, weights = self.points_of(query, reference, shapes)
        return self.output(merge_heads(sample(split_heads(value, self.heads), shapes, locations, weights)))

    def points_of(
        self, query: Float[Array, "N Q E"], reference: Float[Array, "#N Q L R"], shapes: Shapes
    ) -> tuple[Float[Array, "N Q H L P 2"], Float[Array, "N Q H L P"]]:
        """The points of each query, and their weights.

        Both are float32. The weights of a head sum to one over levels and points.
        """
        points = *query.shape[:2], self.heads, self.levels, self.points
        offsets, weights = (layer(query).astype(jnp.float32) for layer in (self.offsets, self.weights))
        weights = jax.nn.softmax(weights.reshape(*points[:3], -1), axis=-1)
        return sampling_locations(reference, offsets.reshape(*points, 2), shapes), weights.reshape(points)


def _ring(heads: int, levels: int, points: int) -> Float[Array, " offsets"]:
    """The initial offsets of all points.

    Head h looks in direction 2 pi h / heads on a square ring, and its k-th point lies at distance k + 1.
    """
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    distance = np.arange(1, points + 1)
    ring = direction[:, None, None, :] * distance[None, None, :, None]
    return jnp.asarray(np.broadcast_to(ring, (heads, levels, points, 2)).reshape(-1), jnp.float32)
