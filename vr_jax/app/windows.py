"""Where the windows of the vision tokens lie on an image: what each token may re-read, as boxes and patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vr_jax.data import tiling
from vr_jax.evaluation import placed_tiles
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.vision_remember import Reread
from vr_jax.model.windows import window_bounds


@dataclass(frozen=True)
class Window:
    """The window of one vision token.

    Attributes:
        tile: The number of the tile among those of the image.
        cell: The number of the token's cell in the tile.
        row: The row of the token in the grid of the whole image, from 0.
        column: The column of the token in the grid of the whole image, from 0.
        box: The left, top, right and bottom edge as fractions of the image. A window may be partly padding.
        patches: The numbers of rows and columns of patches.
    """

    tile: int
    cell: int
    row: int
    column: int
    box: tuple[float, float, float, float]
    patches: tuple[int, int]

    def ratios(self, weights: Float[np.ndarray, "T C S"]) -> Float[np.ndarray, "h w"]:
        """Returns the token's weights, divided by the uniform weight, as its patches lie.

        Args:
            weights: The weights of the tiles of the image.
        """
        rows, columns = self.patches
        return weights[self.tile, self.cell, : rows * columns].reshape(rows, columns) * (rows * columns)


def windows(
    found: Sequence[Reread], size: tuple[int, int], config: VlmConfig, *, alone: bool = True, base: bool = False
) -> list[Window]:
    """Returns the windows of all vision tokens that lie on an image.

    Args:
        found: The weights at each insertion, of the tiles of this image alone (`of_image`).
        size: The width and height of the image in pixels.
        config: The config of the model.
        alone: Whether the image is the only one of its prompt.
        base: Whether the base tile or the overview is meant instead of the grid of tiles.
    """
    seen = placed_tiles(found, size, config, alone=alone, base=base)
    if seen is None:
        return []
    place, tiles = seen
    _, cells, slots = np.shape(found[0].weights)
    side, patch = math.isqrt(cells), config.encoder.patch_size
    wide, high = place.tile or (config.image.tile_size, config.image.tile_size)
    extent = tiling.layout(size, config, alone=alone).extent if config.encoder.layout == "raster" else None
    result = []
    for tile in range(tiles.start, tiles.stop):
        tile_row, tile_column = divmod(tile - place.first, place.columns)
        rows, columns = _bounds(None if extent is None else extent[tile], side, math.isqrt(slots))
        for cell in range(cells):
            if not any(np.any(one.weights[tile, cell]) for one in found):
                continue  # cropped by unpadding, or beyond the slice
            row, column = divmod(cell, side)
            (top, bottom), (left, right) = rows[row], columns[column]
            box = (
                (tile_column * wide + left * patch - place.left) / place.width,
                (tile_row * high + top * patch - place.top) / place.height,
                (tile_column * wide + right * patch - place.left) / place.width,
                (tile_row * high + bottom * patch - place.top) / place.height,
            )
            at = (tile_row * side + row, tile_column * side + column)
            result.append(Window(tile, cell, *at, box, (int(bottom - top), int(right - left))))
    return result


def _bounds(
    extent: Int[np.ndarray, " 2"] | None, side: int, stride: int
) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n 2"]]:
    """Returns the first and the end patch of the windows of each row and of each column of cells."""
    if extent is None:
        even = np.stack([np.arange(side) * stride, (np.arange(side) + 1) * stride], axis=-1)
        return even, even
    rows, columns = (np.stack([np.asarray(edge) for edge in window_bounds(int(n), side)], axis=-1) for n in extent)
    return rows, columns
