"""The batch contract: the arrays that the data pipeline hands to the model, with static shapes.

A row holds several samples (docs/design/decisions.md#decision-7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from vr_jax.pytree import array_dataclass

if TYPE_CHECKING:
    BatchArray = Array
else:
    # A batch has numpy arrays until it is put on devices, and shapes when a program is only compiled.
    BatchArray = Array | np.ndarray | jax.ShapeDtypeStruct

# `vision_cell` of text and padding.
NO_CELL = -1
# `vision_cell` of an image-newline token.
NEWLINE = -2


# The fields of a `Batch` that only some batches have, each with what it describes, the shape of what it has for each of
# them, and its type. `SOURCES` is there where samples come from several sources, the others for some models.
SOURCES = "token_source"
OPTIONAL_FIELDS: dict[str, tuple[Literal["tokens", "tiles"], tuple[int, ...], type[np.generic]]] = {
    "vision_cells": ("tokens", (4,), np.int32),
    "vision_weights": ("tokens", (4,), np.float32),
    "grid_positions": ("tokens", (2,), np.int32),
    "tile_extent": ("tiles", (2,), np.int32),
    "tile_origin": ("tiles", (2,), np.int32),
    SOURCES: ("tokens", (), np.int32),
}


@array_dataclass(kw_only=True)
class TilePlaces:
    """Where the patches of tiles lie, for encoders of images of any size.

    Attributes:
        image: See `Batch.tile_image`.
        extent: See `Batch.tile_extent`.
        origin: See `Batch.tile_origin`.
    """

    image: Int[BatchArray, "B T"]
    extent: Int[BatchArray, "B T 2"]
    origin: Int[BatchArray, "B T 2"] | None = None


@array_dataclass(kw_only=True)
class Batch:
    """B rows of N token slots and T tile slots. Nothing may leak between the samples (segments) of a row.

    Segments, images and tiles are numbered within their row.

    Attributes:
        tokens: Token ids; the slot of a vision token holds the pad id.
        positions: Rotary positions, 0, 1, ... within each segment.
        segment_ids: Numbers 1.. of the samples; 0 is padding.
        loss_mask: True where token i is a target, which position i - 1 of the same segment predicts.
        text_token_mask: The tokens that the text-guided token may pool.
        vision_cell: The cell that a vision token stands for, tile * n * n + row * n + column with n x n cells per tile;
            or `NO_CELL`, or `NEWLINE`.
        tile_pixels: RGB, normalised on the device.
        tile_segment: The segment that a tile belongs to; 0 is an unused slot.
        tile_image: Numbers 1.. of the images; 0 is an unused slot.
        vision_cells: Four cells for each vision token, of which `vision_cell` holds the first, where a token is a
            weighted sum of them. This is so only for grids that LLaVA-OneVision shrinks
            (`ImageConfig.may_interpolate`).
        vision_weights: The weights of these cells.
        grid_positions: The row and the column axis of multi-axis rotary positions, of which `positions` are the time
            axis. All three are equal for text. Only a decoder with `rope_sections` has them.
        tile_extent: Rows and columns of patches that a tile slot holds; zeros in an unused slot. Only encoders of
            images of any size have it (`EncoderConfig.layout`).
        tile_origin: Row and column of a tile's first patch in its image, where tiles are the windows of one grid of
            patches.
        token_source: The number of the source of a token's sample, from 0, where samples come from several sources
            that are told apart; 0 in padding. No model reads it.
    """

    tokens: Int[BatchArray, "B N"]
    positions: Int[BatchArray, "B N"]
    segment_ids: Int[BatchArray, "B N"]
    loss_mask: Bool[BatchArray, "B N"]
    text_token_mask: Bool[BatchArray, "B N"]
    vision_cell: Int[BatchArray, "B N"]
    tile_pixels: UInt8[BatchArray, "B T H W 3"]
    tile_segment: Int[BatchArray, "B T"]
    tile_image: Int[BatchArray, "B T"]
    vision_cells: Int[BatchArray, "B N 4"] | None = None
    vision_weights: Float[BatchArray, "B N 4"] | None = None
    grid_positions: Int[BatchArray, "B N 2"] | None = None
    tile_extent: Int[BatchArray, "B T 2"] | None = None
    tile_origin: Int[BatchArray, "B T 2"] | None = None
    token_source: Int[BatchArray, "B N"] | None = None

    @property
    def tile_places(self) -> TilePlaces | None:
        """Where the patches of the tiles lie, or None where every tile is a full square of its own."""
        if self.tile_extent is None:
            return None
        return TilePlaces(image=self.tile_image, extent=self.tile_extent, origin=self.tile_origin)

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The static sizes of a batch, of one process unless it says otherwise.

    Attributes:
        rows: Number B of rows.
        tokens: Number N of token slots of a row.
        tiles: Number T of tile slots of a row.
        tile_size: Pixels per side of a tile.
    """

    rows: int
    tokens: int
    tiles: int
    tile_size: int


def batch_structs(shape: BatchShape, where: Sharding, optional: Collection[str] = ()) -> Batch:
    """A batch as `vr_jax.data.collate` makes it, with shapes and types in place of arrays.

    Args:
        shape: The sizes of the whole batch.
        where: The sharding of every array.
        optional: Names of the optional fields that the batch has (`VlmConfig.batch_fields`).
    """

    def struct(dtype: DTypeLike, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype, sharding=where)

    fields = {
        **dict.fromkeys(("tokens", "positions", "segment_ids", "vision_cell"), struct(jnp.int32, shape.tokens)),
        **dict.fromkeys(("loss_mask", "text_token_mask"), struct(jnp.bool_, shape.tokens)),
        **dict.fromkeys(("tile_segment", "tile_image"), struct(jnp.int32, shape.tiles)),
        "tile_pixels": struct(jnp.uint8, shape.tiles, shape.tile_size, shape.tile_size, 3),
    }
    for name in optional:
        axis, inner, dtype = OPTIONAL_FIELDS[name]
        fields[name] = struct(dtype, getattr(shape, axis), *inner)
    return Batch(**fields)  # type: ignore[arg-type]  # structs stand for arrays
