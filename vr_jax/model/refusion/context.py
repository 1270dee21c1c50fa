"""What a re-fusion block knows about the images of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vr_jax.model.batch import NEWLINE, Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionContext:
    """Encoder features and where each of their cells sits among the tokens.

    features: what the refusion's `Features` made of the encoder's levels. `cells` below counts the slots of a row:
    tiles * cells per tile."""

    features: Any  # usually (B, T, cells, patches, width), window-major
    vision_cell: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]
    text_token_mask: Bool[Array, "B N"]
    tile_segment: Int[Array, "B T"]
    tile_image: Int[Array, "B T"]
    cells_per_tile: int = field(metadata={"static": True})

    @classmethod
    def of(cls, batch: Batch, features: Any, cells_per_tile: int) -> VisionContext:
        return cls(
            features=features,
            vision_cell=batch.vision_cell,
            segment_ids=batch.segment_ids,
            text_token_mask=batch.text_token_mask,
            tile_segment=batch.tile_segment,
            tile_image=batch.tile_image,
            cells_per_tile=cells_per_tile,
        )

    @property
    def is_vision(self) -> Bool[Array, "B N"]:
        return self.vision_cell >= 0

    def gather_cells(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B cells D"]:
        """The state of the token that stands for each cell. A cell without a token (unused tile, cropped by unpad)
        holds some other token's state: its result must not be read, and `scatter_cells` does not."""
        length = self.vision_cell.shape[1]
        token = self._to_cells(jnp.arange(length, dtype=jnp.int32))
        return jnp.take_along_axis(hidden, token[..., None], axis=1)

    @property
    def has_token(self) -> Bool[Array, "B cells"]:
        """Which cells have a token: not those of unused tiles, nor what unpad crops."""
        return self._to_cells(jnp.ones(self.vision_cell.shape[1], bool))

    def _to_cells(self, values: Shaped[Array, " N"]) -> Shaped[Array, "B cells"]:
        """One value per token slot, put where its cell is; zero elsewhere."""
        rows = self.vision_cell.shape[0]
        slots = self.tile_image.shape[1] * self.cells_per_tile
        index = jnp.where(self.is_vision, self.vision_cell, slots)  # out of range: dropped
        empty = jnp.zeros((rows, slots), values.dtype)
        return jax.vmap(lambda cells, i: cells.at[i].set(values, mode="drop"))(empty, index)

    def scatter_cells(self, cells: Float[Array, "B cells D"]) -> Float[Array, "B N D"]:
        """Each vision token's cell; zeros at every other token."""
        taken = jnp.take_along_axis(cells, jnp.maximum(self.vision_cell, 0)[..., None], axis=1)
        return jnp.where(self.is_vision[..., None], taken, 0)

    def token_group(self, scope: str, newline: bool) -> Int[Array, "B N"]:
        """1 + the tile ('tile') or the image's number ('image') of each vision token, 0 elsewhere. With `newline`,
        newline tokens count to the vision token before them."""
        cell = self.vision_cell
        if newline:
            index = jnp.arange(cell.shape[1])
            last = jax.lax.cummax(jnp.where(cell >= 0, index, 0), axis=1)
            cell = jnp.where(cell == NEWLINE, jnp.take_along_axis(cell, last, axis=1), cell)
        tile = jnp.maximum(cell, 0) // self.cells_per_tile
        group = tile + 1 if scope == "tile" else jnp.take_along_axis(self.tile_image, tile, axis=1)
        return jnp.where(cell >= 0, group, 0)

    def group_segment(self, scope: str) -> Int[Array, "B T"]:
        """The segment that group g + 1 belongs to; 0 if there is no such group. At most one group per tile slot."""
        if scope == "tile":
            return self.tile_segment
        slots = self.tile_image.shape[1]
        member = self.tile_image[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]  # (B, group, tile)
        return jnp.max(jnp.where(member, self.tile_segment[:, None, :], 0), axis=-1)
