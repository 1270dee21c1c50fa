"""Multi-scale deformable attention: each query reads a few sampled points of every feature map.

Source: fundamentalvision/Deformable-DETR `models/ops/modules/ms_deform_attn.py` (`MSDeformAttn`),
`models/ops/functions/ms_deform_attn_func.py` (`ms_deform_attn_core_pytorch`)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.model.layers import linear, merge_heads, split_heads, xavier

Shapes = Sequence[tuple[int, int]]  # (rows, columns) of each level's map


def sampling_locations(
    reference: Float[Array, "N Q L R"], offsets: Float[Array, "N Q H L P 2"], shapes: Shapes
) -> Float[Array, "N Q H L P 2"]:
    """Points (x, y) in units of the map, 0 its left or top edge and 1 its right or bottom edge.

    reference: R = 2, points (x, y), from which offsets are patches; R = 4, boxes (x, y, width, height) around their
    centre, from which offsets are P-ths of half the box."""
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
    """Weighted sum of the bilinearly sampled points (torch: grid_sample, zeros outside, align_corners=False).

    value: M patches of all levels, level after level, each in raster order."""
    count, _, heads, _ = value.shape
    rows, columns = (np.asarray(side, np.int32)[:, None] for side in zip(*shapes, strict=True))
    start = np.cumsum([0, *(math.prod(shape) for shape in shapes)], dtype=np.int32)[:-1, None]
    # Centres of patches are whole numbers. Always float32: a bfloat16 has too few digits for them.
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
        """(N, H, Q, points of all levels, four corners each)"""
        stacked = jnp.stack(corners, axis=-1)
        return stacked.reshape(*stacked.shape[:3], -1).swapaxes(1, 2)

    points, shares = per_head(index), per_head(share)
    taken = jnp.take_along_axis(value.swapaxes(1, 2), points.reshape(count, heads, -1, 1), axis=2)
    taken = taken.reshape(*points.shape, -1)
    return jnp.einsum("nhqp,nhqpd->nqhd", shares.astype(value.dtype), taken)


class DeformableAttention(nnx.Module):
    """MSDeformAttn with its initial values: points in a ring of `heads` directions, at distances 1 .. `points`."""

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        levels: int,
        points: int,
        *,
        out_init: Callable | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(linear, width, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros
        count = heads * levels * points
        self.offsets = make(2 * count, init=zeros, bias_init=lambda *_: _ring(heads, levels, points))
        self.weights = make(count, init=zeros)
        self.value = make(width, init=xavier)
        self.output = make(out_width, init=out_init or xavier)
        self.heads, self.levels, self.points = heads, levels, points

    def attend(
        self,
        query: Float[Array, "N Q E"],
        reference: Float[Array, "N Q L R"],
        features: Float[Array, "N M E"],
        shapes: Shapes,
        padding: Bool[Array, "N M"] | None = None,
    ) -> Float[Array, "N Q O"]:
        """features: all levels one after another, each in raster order; where `padding` is True they count as zero."""
        value = self.value(features)
        if padding is not None:
            value = jnp.where(padding[..., None], 0, value)
        return self.read(query, reference, value, shapes)

    def read(
        self,
        query: Float[Array, "N Q E"],
        reference: Float[Array, "N Q L R"],
        value: Float[Array, "N M E"],
        shapes: Shapes,
    ) -> Float[Array, "N Q O"]:
        """From projected values on."""
        locations, weights = self.points_of(query, reference, shapes)
        return self.output(merge_heads(sample(split_heads(value, self.heads), shapes, locations, weights)))

    def points_of(
        self, query: Float[Array, "N Q E"], reference: Float[Array, "N Q L R"], shapes: Shapes
    ) -> tuple[Float[Array, "N Q H L P 2"], Float[Array, "N Q H L P"]]:
        """Where each query looks, and the weight of each point, float32: a head's sum to one over levels and points."""
        points = *query.shape[:2], self.heads, self.levels, self.points
        offsets, weights = (layer(query).astype(jnp.float32) for layer in (self.offsets, self.weights))
        weights = jax.nn.softmax(weights.reshape(*points[:3], -1), axis=-1)
        return sampling_locations(reference, offsets.reshape(*points, 2), shapes), weights.reshape(points)


def _ring(heads: int, levels: int, points: int) -> Float[Array, " offsets"]:
    """Head h looks in direction 2 pi h / heads (on a square ring), its k-th point at distance k + 1."""
    angle = 2 * np.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    distance = np.arange(1, points + 1)
    ring = direction[:, None, None, :] * distance[None, None, :, None]
    return jnp.asarray(np.broadcast_to(ring, (heads, levels, points, 2)).reshape(-1), jnp.float32)
