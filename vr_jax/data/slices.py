"""MiniCPM-V 2.0's tiles: an overview of the image, and pieces of it of nearly its own aspect ratio.

Source: openbmb/MiniCPM-V-2 `image_processing_minicpmv.py` (`slice_image`, `find_best_resize`, `get_refine_size`,
`get_sliced_grid`, `split_to_patches` and `get_slice_image_placeholder`); docs/data.md#slices.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vr_jax.data.layouts import Placement, TokenLayout, frozen
from vr_jax.data.resizing import resized
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Marker
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig
from vr_jax.model.windows import largest_window, window_capacity


@dataclass(frozen=True)
class Slicing:
    """How an image is cut; all sizes are (width, height) in pixels.

    Attributes:
        overview: The size of the whole image as its first slice.
        grid: The (columns, rows) of the grid of pieces, or None for an image that is not cut.
        refined: The size that the image is resized to before it is cut, or None.
    """

    overview: tuple[int, int]
    grid: tuple[int, int] | None = None
    refined: tuple[int, int] | None = None

    @property
    def piece(self) -> tuple[int, int] | None:
        """The size of each piece, or None."""
        if self.grid is None or self.refined is None:
            return None
        return self.refined[0] // self.grid[0], self.refined[1] // self.grid[1]

    @property
    def slices(self) -> list[tuple[int, int]]:
        """The size of each slice: first the overview, then the pieces row by row."""
        if self.grid is None or self.piece is None:
            return [self.overview]
        return [self.overview, *[self.piece] * (self.grid[0] * self.grid[1])]


def slicing(size: tuple[int, int], patch_size: int, config: ImageConfig) -> Slicing:
    """Decides how an image is cut.

    An image with more pixels than a square of `slice_size` is cut, into about as many pieces as it has times the pixels
    of that square, and into `max_slices` at most.

    Args:
        size: The (width, height) of the image.
        patch_size: Pixels per side of a patch; the sides of all slices are multiples of it.
        config: The size of a slice and the most pieces.

    Raises:
        SkipRecord: The image has no pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise SkipRecord("image_shape", f"The image has {width} x {height} pixels, which is no area to look at.")
    overview = _resized_size(size, patch_size, config.slice_size)
    pieces = min(math.ceil(width * height / config.slice_size**2), config.max_slices)
    if pieces <= 1:
        return Slicing(overview)
    columns, rows = grid = _grid(size, pieces, config.max_slices)
    # A piece has the size that an image has that is not cut, with the aspect ratio of this part of the image.
    part = _multiple(width, columns) / columns, _multiple(height, rows) / rows
    piece = _resized_size(part, patch_size, config.slice_size)
    return Slicing(overview, grid, (piece[0] * columns, piece[1] * rows))


def _grid(size: tuple[int, int], pieces: int, most: int) -> tuple[int, int]:
    """The (columns, rows) of about `pieces` pieces whose logarithm of the aspect ratio is nearest to the image's."""
    numbers = [number for number in (pieces - 1, pieces, pieces + 1) if 1 < number <= most]
    grids = [(columns, n // columns) for n in numbers for columns in range(1, n + 1) if n % columns == 0]
    ratio = math.log(size[0] / size[1])
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))


def _resized_size(size: tuple[float, float], patch_size: int, side: int) -> tuple[int, int]:
    """The size with about side x side pixels and the aspect ratio of `size`, in whole patches.

    The height is truncated to an integer before the width follows from it, so that wide and tall images differ.
    """
    ratio = size[0] / size[1]
    height = int(side / math.sqrt(ratio))
    return _multiple(int(height * ratio), patch_size), _multiple(height, patch_size)


def _multiple(length: float, unit: int) -> int:
    """The multiple of `unit` nearest to a length, an even one of two equally near ones, and one unit at least."""
    return max(round(length / unit), 1) * unit


@functools.lru_cache(maxsize=4096)
def layout(
    size: tuple[int, int], patch_size: int, cells_per_side: int, config: ImageConfig, *, windows: bool = False
) -> TokenLayout:
    """Lays out the vision tokens of an image: each slice's cells between two markers, the pieces between two more.

    Args:
        size: The (width, height) of the image.
        patch_size: Pixels per side of a patch.
        cells_per_side: The number of cells per side of a slice.
        config: The size of a slice, the most pieces, and the size of a tile slot.
        windows: Whether re-fusion blocks read the adaptive window of each cell, which has a largest size.

    Returns:
        The layout. It is cached and shared, so its arrays are read-only.

    Raises:
        SkipRecord: The image has no pixels, or a slice has more patches than a slot or than a window holds.
    """
    found = slicing(size, patch_size, config)
    extent = np.asarray([(height // patch_size, width // patch_size) for width, height in found.slices], np.int32)
    _check_extent(size, extent, (config.tile_size // patch_size) ** 2, cells_per_side if windows else None)
    marker: list[int] = []
    one = [Marker.IMAGE_START, *[Marker.NONE] * cells_per_side**2, Marker.IMAGE_END]
    marker += one
    if found.grid is not None:
        columns, rows = found.grid
        marker.append(Marker.SLICE_START)
        for row in range(rows):
            marker += one * columns
            marker.append(Marker.ROW_END if row < rows - 1 else Marker.SLICE_END)
    markers = np.asarray(marker, np.int32)
    cell = np.full(len(markers), NO_CELL, np.int32)
    vision = markers == Marker.NONE
    cell[vision] = np.arange(np.count_nonzero(vision))
    return frozen(TokenLayout(cell, len(extent), found.grid, marker=markers, extent=extent))


def _check_extent(
    size: tuple[int, int], extent: Int[np.ndarray, "t 2"], room: int, cells_per_side: int | None = None
) -> None:
    """Checks that a slot has room for the patches of each slice, and a window for those of each cell."""
    rows, columns = max(extent.tolist(), key=math.prod)
    if rows * columns > room:
        raise SkipRecord(
            "image_shape",
            f"The image of {size[0]} x {size[1]} pixels makes a slice of {columns} x {rows} patches, but a tile slot "
            f"has room for {room}.",
        )
    if cells_per_side is None:
        return
    window = window_capacity(room, cells_per_side)
    for rows, columns in extent.tolist():
        if (found := largest_window(rows, columns, cells_per_side)) > window:
            raise SkipRecord(
                "image_shape",
                f"The image of {size[0]} x {size[1]} pixels makes a slice of {columns} x {rows} patches, of which a "
                f"vision token would re-read {found}, but at most {window} are possible.",
            )


def tiles(image: Image.Image, patch_size: int, config: ImageConfig) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an RGB image into the slices that `layout` counts for its size.

    The patches of a slice, row by row, fill the patches of its slot, row by row; zeros follow.

    Args:
        image: The image in mode RGB.
        patch_size: Pixels per side of a patch.
        config: The size of a slice, the most pieces, the size of a tile slot, and the filter that resizes.

    Raises:
        SkipRecord: As `layout`.
    """
    found = slicing(image.size, patch_size, config)
    extent = np.asarray([(height // patch_size, width // patch_size) for width, height in found.slices], np.int32)
    _check_extent(image.size, extent, (config.tile_size // patch_size) ** 2)
    pieces = [np.asarray(resized(image, found.overview, config.resample))]
    if found.grid is not None and found.refined is not None and found.piece is not None:
        refined = np.asarray(resized(image, found.refined, config.resample))
        (columns, rows), (width, height) = found.grid, found.piece
        pieces += [
            refined[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]
    result = np.zeros((len(pieces), config.tile_size, config.tile_size, 3), np.uint8)
    for slot, pixels in zip(result, pieces, strict=True):
        _pack(slot, pixels, patch_size)
    return result


def _pack(slot: UInt8[np.ndarray, "H W 3"], pixels: UInt8[np.ndarray, "h w 3"], patch_size: int) -> None:
    """Writes the patches of a slice into a slot, both in raster order."""
    rows, columns, grid = (side // patch_size for side in (*pixels.shape[:2], slot.shape[0]))
    patches = pixels.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    canvas = np.zeros((grid * grid, patch_size, patch_size, 3), np.uint8)
    canvas[: rows * columns] = patches.reshape(-1, patch_size, patch_size, 3)
    side = grid * patch_size
    slot[:side, :side] = canvas.reshape(grid, grid, patch_size, patch_size, 3).swapaxes(1, 2).reshape(side, side, 3)


def placement(size: tuple[int, int], patch_size: int, config: ImageConfig, *, base: bool = False) -> Placement:
    """Returns where the slices of an image lie: the pieces side by side, or the overview alone.

    Args:
        size: The (width, height) of the image.
        patch_size: Pixels per side of a patch.
        config: The size of a slice and the most pieces.
        base: Whether the overview is asked for. It is all that an image has that is not cut.

    Raises:
        SkipRecord: The image has no pixels.
    """
    found = slicing(size, patch_size, config)
    if base or found.grid is None or found.refined is None:
        width, height = found.overview
        return Placement(0, 1, 1, 0.0, 0.0, float(width), float(height), tile=found.overview)
    (columns, rows), (width, height) = found.grid, found.refined
    return Placement(1, columns, rows, 0.0, 0.0, float(width), float(height), tile=found.piece)


def largest_size(config: ImageConfig) -> tuple[int, int]:
    """Returns the (width, height) of an image that is cut into the most pieces, as nearly square as there is one."""
    rows = next(rows for rows in range(math.isqrt(config.max_slices), 0, -1) if config.max_slices % rows == 0)
    return config.max_slices // rows * config.slice_size, rows * config.slice_size
