"""Cutting of an image into tiles, and the vision tokens that follow from the size of the image.

This is host code on sizes and PIL images. It reproduces LLaVA-NeXT: llava/mm_utils.py (select_best_resolution,
resize_and_pad_image, divide_to_patches, process_anyres_image, expand2square) and llava/model/llava_arch.py (unpad_image
and the packing of image features); see `docs/design/methods.md#image-preprocessing` and
`docs/design/methods.md#anyres`. Sizes are (width, height) in pixels and grids are (columns, rows) in tiles.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image

from vr_jax.data.layouts import Placement, TokenLayout, frozen
from vr_jax.data.resizing import centred, covering_size, cropped_square, padded_square, resized
from vr_jax.model.batch import NEWLINE
from vr_jax.model.config import ImageConfig

# `anyres_max_N` shrinks a map of tokens whose side exceeds that of N tiles by more than this factor.
BILINEAR_ABOVE = 1.1


def select_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...], tile_size: int) -> tuple[int, int]:
    """Selects the grid that keeps most of the image's pixels and, among those, wastes the fewest of its own.

    Args:
        size: The (width, height) of the image.
        grids: The allowed (columns, rows); the first of equally good ones is selected.
        tile_size: The side of a tile in pixels.
    """
    width, height = size
    best, best_fit = grids[0], (-1, 0)
    for columns, rows in grids:
        target_w, target_h = columns * tile_size, rows * tile_size
        scale = min(target_w / width, target_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        fit = (effective, -(target_w * target_h - effective))
        if fit > best_fit:
            best, best_fit = (columns, rows), fit
    return best


def fitted_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size inside `target` with the aspect ratio of `size`; the shorter side is rounded up."""
    width, height = size
    scale_w, scale_h = target[0] / width, target[1] / height
    if scale_w < scale_h:
        return target[0], min(math.ceil(height * scale_w), target[1])
    return min(math.ceil(width * scale_h), target[0]), target[1]


def unpadded(
    size: tuple[int, int], map_size: tuple[int, int], rounding: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Finds the part of a feature map that is not padding (LLaVA's `unpad_image`).

    Args:
        size: The (width, height) of the image.
        map_size: The (width, height) of the feature map.
        rounding: "truncate" for LLaVA's int(x), "round7" for transformers' int(round(x, 7)). The two sometimes differ
            by one row or column.

    Returns:
        The half-open ranges of rows and of columns.
    """
    width, height = size
    map_w, map_h = map_size
    to_int = int if rounding == "truncate" else lambda x: int(round(x, 7))
    if width / height > map_w / map_h:
        crop = (map_h - to_int(height * (map_w / width))) // 2
        return (crop, map_h - crop), (0, map_w)
    crop = (map_w - to_int(width * (map_h / height))) // 2
    return (0, map_h), (crop, map_w - crop)


@functools.lru_cache(maxsize=4096)
def layout(size: tuple[int, int], u: int, config: ImageConfig, *, alone: bool = True) -> TokenLayout:
    """Lays out the vision tokens of an image.

    Args:
        size: The (width, height) of the image.
        u: The number of compressed cells along a side of a tile.
        config: The mode and the grids.
        alone: Whether the image is the only one of its sample. The images of a sample with several get one tile each.

    Returns:
        The layout. It is cached and shared, so its arrays are read-only.
    """
    base = np.arange(u * u, dtype=np.int32)
    if not (config.is_anyres and alone):
        return frozen(TokenLayout(np.append(base, np.int32(NEWLINE)) if config.unpad else base, tiles=1))
    columns, rows = grid = select_grid(size, config.grids, config.tile_size)
    tile, cell = np.meshgrid(np.arange(1, 1 + columns * rows), base, indexing="ij")
    raster = (tile * u * u + cell).reshape(rows, columns, u, u).swapaxes(1, 2).reshape(rows * u, columns * u)
    tiles = 1 + columns * rows
    if not config.unpad:
        return frozen(TokenLayout(np.append(base, raster).astype(np.int32), tiles, grid))
    (top, bottom), (left, right) = unpadded(size, (columns * u, rows * u), config.unpad_rounding)
    kept = raster[top:bottom, left:right].astype(np.int32)
    shrink = math.sqrt(kept.shape[0] * kept.shape[1] / (config.max_tiles * u * u))
    if config.aspect_ratio != "anyres_max" or shrink <= BILINEAR_ABOVE:
        return frozen(TokenLayout(np.append(base, _with_newlines(kept, NEWLINE)), tiles, grid))
    out_h, out_w = (max(1, int(side // shrink)) for side in kept.shape)
    corners, weights = _bilinear(kept, out_h, out_w)
    cells = np.concatenate([np.tile(base[:, None], 4), _with_newlines(corners, 0)])
    base_weights = np.tile(np.asarray([[1, 0, 0, 0]], np.float32), (u * u, 1))
    weights = np.concatenate([base_weights, _with_newlines(weights, 0)])
    cell = np.append(base, _with_newlines(corners[..., 0], NEWLINE))
    return frozen(TokenLayout(cell, tiles, grid, cells, weights))


def _with_newlines(rows: Shaped[np.ndarray, "h w ..."], value: int) -> Shaped[np.ndarray, "n ..."]:
    """Appends a column of `value` to rows (h, w, ...) and flattens them row by row."""
    newline = np.full_like(rows, value, shape=(rows.shape[0], 1, *rows.shape[2:]))
    return np.concatenate([rows, newline], axis=1).reshape(-1, *rows.shape[2:])


def _bilinear(
    cells: Int[np.ndarray, "h w"], out_h: int, out_w: int
) -> tuple[Int[np.ndarray, "a b 4"], Float[np.ndarray, "a b 4"]]:
    """Returns the neighbours and weights of torch's interpolate(mode="bilinear", align_corners=False)."""
    low_y, high_y, frac_y = _source_index(cells.shape[0], out_h)
    low_x, high_x, frac_x = _source_index(cells.shape[1], out_w)
    corners = [cells[np.ix_(y, x)] for y in (low_y, high_y) for x in (low_x, high_x)]
    weights = [np.outer(y, x) for y in (1 - frac_y, frac_y) for x in (1 - frac_x, frac_x)]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1)


def _source_index(
    size: int, out: int
) -> tuple[Int[np.ndarray, " out"], Int[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """Returns the lower and upper source index of every output index, and the fraction between them.

    It reproduces torch's area_pixel_compute_source_index: the scale is a float32, and the product and the difference
    are rounded once, as in a fused multiply-add.
    """
    scale = np.float32(size) / np.float32(out)
    centre = np.float64(scale) * (np.arange(out) + 0.5) - 0.5
    position = np.maximum(centre, 0).astype(np.float32)
    low = np.minimum(position.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), np.clip(position - low.astype(np.float32), 0, 1)


def tiles(image: Image.Image, config: ImageConfig, *, alone: bool = True) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an RGB image into tiles: first the base tile, which is the whole image squashed, then the grid row by row.

    The tiles match what `layout` returns for the image's size. The mode "pad", and the modes with a grid for an image
    that is not alone, pad the image to a square with the mean colour and give one tile.

    Args:
        image: The image in mode RGB. Pillow resizes it.
        config: The mode, the grids, and the filter that resizes.
        alone: Whether the image is the only one of its sample.
    """
    side = config.tile_size
    if config.aspect_ratio == "square":
        return np.asarray(resized(image, (side, side), config.resample))[None]
    if config.aspect_ratio == "crop":
        return cropped_square(image, side, config.resample)[None]
    if not (config.is_anyres and alone):
        return padded_square(image, side, config.pad_colour, config.resample)[None]
    columns, rows = select_grid(image.size, config.grids, side)
    target = (columns * side, rows * side)
    fitted = np.asarray(resized(image, fitted_size(image.size, target), config.resample))
    left, top = centred((fitted.shape[1], fitted.shape[0]), target)
    result = np.zeros((1 + columns * rows, side, side, 3), np.uint8)
    result[0] = np.asarray(resized(image, (side, side), config.resample))
    for row in range(rows):
        for column in range(columns):
            y, x = row * side - top, column * side - left
            part = fitted[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
            inside = result[1 + row * columns + column, max(-y, 0) :, max(-x, 0) :]
            inside[: part.shape[0], : part.shape[1]] = part
    return result


def placement(size: tuple[int, int], config: ImageConfig, *, alone: bool = True, base: bool = False) -> Placement:
    """Returns where `tiles` puts an image.

    Args:
        size: The (width, height) of the image.
        config: The mode and the grids.
        alone: Whether the image is the only one of its sample.
        base: Whether the placement on the base tile is asked for instead of that on the grid. Where there is no grid,
            both are the same.
    """
    side = config.tile_size
    if config.is_anyres and alone and not base:
        columns, rows = select_grid(size, config.grids, side)
        fitted = fitted_size(size, (columns * side, rows * side))
        left, top = centred(fitted, (columns * side, rows * side))
        return Placement(1, columns, rows, float(left), float(top), float(fitted[0]), float(fitted[1]))
    if config.aspect_ratio == "square" or (config.is_anyres and alone):
        return Placement(0, 1, 1, 0.0, 0.0, float(side), float(side))
    if config.aspect_ratio == "crop":
        width, height = covering_size(size, side)
        left, top = -((width - side) // 2), -((height - side) // 2)
        return Placement(0, 1, 1, float(left), float(top), float(width), float(height))
    square = max(size)
    left, top = centred(size, (square, square))
    return Placement(0, 1, 1, *(side * value / square for value in (left, top, *size)))
