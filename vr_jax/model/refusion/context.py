"""`VisionContext`: the images of a batch as a re-fusion block sees them."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.windows import adaptive_windows
from vr_jax.pytree import array_dataclass


@array_dataclass
class VisionContext:
    """The encoder's features, and the token that stands for each of their cells.

    In the shapes of the methods, `cells` is the number of cell slots of a row: tile slots times cells per tile.

    Attributes:
        features: The result of the method's `build_features` module, usually (B, T, cells of a tile, patches of a cell,
            width).
        vision_cell: See `Batch`.
        segment_ids: See `Batch`.
        text_token_mask: See `Batch`.
        tile_segment: See `Batch`.
        tile_image: See `Batch`.
        cells_per_tile: Vision tokens of a tile.
        patch: The number of each window's patches in its slot, where windows adapt to slices of any grid; else None.
        valid: Whether there is such a patch; None if all patch slots hold one. Blocks must not read other patches.
    """

    features: Any
    vision_cell: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]
    text_token_mask: Bool[Array, "B N"]
    tile_segment: Int[Array, "B T"]
    tile_image: Int[Array, "B T"]
    cells_per_tile: int = field(metadata={"static": True})
    patch: Int[Array, "B T C S"] | None = None
    valid: Bool[Array, "B T C S"] | None = None

    @classmethod
    def of(cls, batch: Batch, features: Any, cells_per_tile: int, window_slots: int | None = None) -> VisionContext:
        """The context of a batch with the given features.

        Args:
            batch: The batch.
            features: See the attribute. Where windows adapt to slices, they are (B, T, 1, patches of a slot, width),
                and `in_windows` gathers them.
            cells_per_tile: Vision tokens of a tile.
            window_slots: Patch slots of an adaptive window, or None where windows have one size.
        """
        patch = valid = None
        if window_slots is not None:
            assert batch.tile_extent is not None
            patch, valid = adaptive_windows(jnp.asarray(batch.tile_extent), round(cells_per_tile**0.5), window_slots)
        return cls(
            patch=patch,
            valid=valid,
            features=features,
            vision_cell=batch.vision_cell,
            segment_ids=batch.segment_ids,
            text_token_mask=batch.text_token_mask,
            tile_segment=batch.tile_segment,
            tile_image=batch.tile_image,
            cells_per_tile=cells_per_tile,
        )

    def in_windows(self) -> VisionContext:
        """The same with features by window, (B, T, cells of a tile, patches of a cell, width)."""
        patch = self.patch
        if patch is None:
            return self

        def gather(slots: Float[Array, "B T 1 P E"]) -> Float[Array, "B T C S E"]:
            index = patch.reshape(*patch.shape[:2], -1, 1)
            return jnp.take_along_axis(slots[:, :, 0], index, axis=2).reshape(*patch.shape, slots.shape[-1])

        return dataclasses.replace(self, features=jax.tree.map(gather, self.features), patch=None)

    @property
    def is_vision(self) -> Bool[Array, "B N"]:
        """The mask of the vision tokens, without newlines."""
        return self.vision_cell >= 0

    def gather_cells(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B cells D"]:
        """The state of the token that stands for each cell.

        A cell without a token, in an unused tile or cropped by unpad, holds some other token's state. Its result must
        not be read, and `scatter_cells` does not read it.
        """
        length = self.vision_cell.shape[1]
        token = self._to_cells(jnp.arange(length, dtype=jnp.int32))
        return jnp.take_along_axis(hidden, token[..., None], axis=1)

    @property
    def has_token(self) -> Bool[Array, "B cells"]:
        """The mask of the cells that have a token; those of unused tiles and those cropped by unpad have none."""
        return self._to_cells(jnp.ones(self.vision_cell.shape[1], bool))

    def _to_cells(self, values: Shaped[Array, " N"]) -> Shaped[Array, "B cells"]:
        """Puts the value of each token slot where its cell is; other cells are zero."""
        rows = self.vision_cell.shape[0]
        slots = self.tile_image.shape[1] * self.cells_per_tile
        # Other tokens point out of range, which drops them.
        index = jnp.where(self.is_vision, self.vision_cell, slots)
        empty = jnp.zeros((rows, slots), values.dtype)
        placed: Array = jax.vmap(lambda cells, i: cells.at[i].set(values, mode="drop"))(empty, index)
        return placed

    def scatter_cells(self, cells: Float[Array, "B cells D"]) -> Float[Array, "B N D"]:
        """The value of each vision token's cell; every other token has zeros."""
        taken = jnp.take_along_axis(cells, jnp.maximum(self.vision_cell, 0)[..., None], axis=1)
        return jnp.where(self.is_vision[..., None], taken, 0)

    def token_group(self, scope: str, newline: bool) -> Int[Array, "B N"]:
        """The group of each vision token, counted from 1; 0 for other tokens.

        Args:
            scope: "tile" makes each tile a group, "image" each image.
            newline: Whether newline tokens belong to the group of the vision token before them.
        """
        cell = self.vision_cell
        if newline:
            index = jnp.arange(cell.shape[1])
            last = jax.lax.cummax(jnp.where(cell >= 0, index, 0), axis=1)
            cell = jnp.where(cell == NEWLINE, jnp.take_along_axis(cell, last, axis=1), cell)
        tile = jnp.maximum(cell, 0) // self.cells_per_tile
        group = tile + 1 if scope == "tile" else jnp.take_along_axis(self.tile_image, tile, axis=1)
        return jnp.where(cell >= 0, group, 0)

    def group_segment(self, scope: str) -> Int[Array, "B T"]:
        """The segment that group g + 1 belongs to, for as many groups as there are tile slots; 0 for no such group."""
        if scope == "tile":
            return self.tile_segment
        slots = self.tile_image.shape[1]
        # The axes are row, group and tile.
        member = self.tile_image[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]
        return jnp.max(jnp.where(member, self.tile_segment[:, None, :], 0), axis=-1)
