"""The batch contract: what the data pipeline hands to the model. Static shapes, several samples per row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

NO_CELL = -1  # `vision_cell` of text and padding
NEWLINE = -2  # `vision_cell` of an image-newline token


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of N token slots and T tile slots. Nothing may leak between the samples (segments) of a row.

    Segments, images and tiles are numbered within their row. A vision token's slot in `tokens` holds the pad id;
    `vision_cell` says which compressed cell it stands for. `loss_mask[b, i]` marks *token i as a target*
    (predicted from position i - 1 of the same segment).
    """

    tokens: Int[Array, "B N"]
    positions: Int[Array, "B N"]  # rotary positions, 0.. within each segment
    segment_ids: Int[Array, "B N"]  # 1.. per sample, 0 = padding
    loss_mask: Bool[Array, "B N"]
    text_token_mask: Bool[Array, "B N"]  # tokens the text-guided token may pool
    vision_cell: Int[Array, "B N"]  # tile * n*n + (cell row * n + cell column), or NO_CELL, or NEWLINE
    tile_pixels: UInt8[Array, "B T H W 3"]  # RGB; normalised on the device
    tile_segment: Int[Array, "B T"]  # the segment a tile belongs to, 0 = unused slot
    tile_image: Int[Array, "B T"]  # 1.. per image of the row, 0 = unused slot
    # Only for grids with OneVision's bilinear branch (ImageConfig.may_interpolate): a vision token is then the weighted
    # sum of four cells, of which `vision_cell` holds the first.
    vision_cells: Int[Array, "B N 4"] | None = None
    vision_weights: Float[Array, "B N 4"] | None = None

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The static sizes of a batch on one process (or globally, where said so)."""

    rows: int  # B
    tokens: int  # N
    tiles: int  # T
    tile_size: int  # H = W, pixels


def batch_structs(shape: BatchShape, where: Sharding, *, weighted_cells: bool) -> Batch:
    """A Batch of this shape as `vr_jax.data.collate` makes it, on devices as `where` says; without arrays."""

    def struct(dtype: DTypeLike, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype, sharding=where)

    fields = {
        **dict.fromkeys(("tokens", "positions", "segment_ids", "vision_cell"), struct(jnp.int32, shape.tokens)),
        **dict.fromkeys(("loss_mask", "text_token_mask"), struct(jnp.bool_, shape.tokens)),
        **dict.fromkeys(("tile_segment", "tile_image"), struct(jnp.int32, shape.tiles)),
        "tile_pixels": struct(jnp.uint8, shape.tiles, shape.tile_size, shape.tile_size, 3),
    }
    if weighted_cells:
        fields["vision_cells"] = struct(jnp.int32, shape.tokens, 4)
        fields["vision_weights"] = struct(jnp.float32, shape.tokens, 4)
    return Batch(**fields)  # type: ignore[arg-type]  # no arrays
