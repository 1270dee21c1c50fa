"""Qwen2.5-VL's tiles: an image of any size is resized to whole cells and cut into attention windows.

Sizes are (width, height) in pixels, except those of `smart_resize`, which has the order of transformers.

Source: transformers `models/qwen2_vl/image_processing_pil_qwen2_vl.py` (`smart_resize` and `patchify`) and
`models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`get_window_index`).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data.layouts import Placement, TokenLayout, frozen
from vr_jax.data.resizing import resized
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Marker
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig

# transformers refuses an image whose longer side is more than so many times the shorter one.
MAX_RATIO = 200
# A layout of the largest images takes 0.3 MB.
_CACHED_LAYOUTS = 256


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the (height, width) that an image is resized to: multiples of `factor` near its own size.

    A half is rounded to the even number. A side below half a factor is rounded to zero first, and the image is then
    enlarged like any other that has too few pixels.

    Args:
        height: The height of the image.
        width: The width of the image.
        factor: The side of a cell in pixels.
        min_pixels: The fewest pixels of the result.
        max_pixels: The most pixels of the result. A side is never shorter than a cell, so that very long images may
            exceed it.

    Raises:
        SkipRecord: The image has no area, or one side is more than `MAX_RATIO` times the other.
    """
    shorter, longer = sorted((height, width))
    if shorter < 1:
        raise SkipRecord("image_shape", f"The image has {width} x {height} pixels, which is no area to look at.")
    if longer / shorter > MAX_RATIO:
        raise SkipRecord(
            "image_shape",
            f"The image has {width} x {height} pixels, but the longer side may be at most {MAX_RATIO} times the "
            "shorter one in a model with image.aspect_ratio 'native'.",
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        rows = max(1, math.floor(height / beta / factor))
        columns = max(1, math.floor(width / beta / factor))
    elif rows * columns * factor**2 < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
    return rows * factor, columns * factor


def resized_size(size: tuple[int, int], patch_size: int, stride: int, config: ImageConfig) -> tuple[int, int]:
    """Returns the (width, height) that an image of (width, height) pixels is resized to.

    Args:
        size: The size of the image.
        patch_size: Pixels per side of a patch.
        stride: Patches per side of a cell.
        config: The limits of the number of pixels.

    Raises:
        SkipRecord: See `smart_resize`.
    """
    width, height = size
    height, width = smart_resize(height, width, patch_size * stride, config.min_pixels, config.max_pixels)
    return width, height


def layout(size: tuple[int, int], patch_size: int, stride: int, config: ImageConfig) -> TokenLayout:
    """Lays out the vision tokens of an image: one for each cell, row by row over the whole image, between two markers.

    Args:
        size: The (width, height) of the image.
        patch_size: Pixels per side of a patch.
        stride: Patches per side of a cell.
        config: The side of a window, and the limits of the number of pixels.

    Returns:
        The layout. It is cached and shared, so its arrays are read-only.

    Raises:
        SkipRecord: See `smart_resize`.
    """
    width, height = resized_size(size, patch_size, stride, config)
    side = patch_size * stride
    return _layout(height // side, width // side, config.tile_size // side, stride)


@functools.lru_cache(maxsize=_CACHED_LAYOUTS)
def _layout(rows: int, columns: int, cells: int, stride: int) -> TokenLayout:
    """Lays out an image of rows x columns cells, in windows of cells x cells cells of stride x stride patches."""
    row, column = np.indices((rows, columns), np.int32)
    down, across = -(-rows // cells), -(-columns // cells)
    tile = row // cells * across + column // cells
    cell = tile * cells**2 + row % cells * cells + column % cells
    count = rows * columns
    marker = np.full(count + 2, Marker.NONE, np.int8)
    marker[[0, -1]] = Marker.IMAGE_START, Marker.IMAGE_END
    place = np.stack([row.ravel(), column.ravel()], axis=-1)
    first = np.indices((down, across), np.int32).reshape(2, -1).T * np.int32(cells)
    extent = np.minimum(np.asarray([rows, columns], np.int32) - first, cells)
    return frozen(
        TokenLayout(
            cell=np.pad(cell.ravel(), 1, constant_values=NO_CELL),
            tiles=down * across,
            grid=(across, down),
            marker=marker,
            place=np.pad(place, ((1, 1), (0, 0)), constant_values=-1),
            extent=extent * stride,
            origin=first * stride,
        )
    )


def tiles(image: Image.Image, patch_size: int, stride: int, config: ImageConfig) -> UInt8[np.ndarray, "t H W 3"]:
    """Resizes an RGB image and cuts it into windows, row by row.

    The windows match what `layout` returns for the image's size. What lies beyond the image in the windows at its right
    and bottom edge is zero.

    Args:
        image: The image in mode RGB. Pillow resizes it.
        patch_size: Pixels per side of a patch.
        stride: Patches per side of a cell.
        config: The side of a window, the limits of the number of pixels, and the filter that resizes.

    Raises:
        SkipRecord: See `smart_resize`.
    """
    size = resized_size(image.size, patch_size, stride, config)
    pixels = np.asarray(resized(image, size, config.resample))
    side = config.tile_size
    across, down = (-(-extent // side) for extent in size)
    result = np.zeros((down * across, side, side, 3), np.uint8)
    for number, window in enumerate(result):
        y, x = number // across * side, number % across * side
        part = pixels[y : y + side, x : x + side]
        window[: part.shape[0], : part.shape[1]] = part
    return result


def placement(size: tuple[int, int], patch_size: int, stride: int, config: ImageConfig) -> Placement:
    """Returns where `tiles` puts an image; see `layout` for the arguments.

    Raises:
        SkipRecord: See `smart_resize`.
    """
    width, height = resized_size(size, patch_size, stride, config)
    columns, rows = -(-width // config.tile_size), -(-height // config.tile_size)
    return Placement(0, columns, rows, 0.0, 0.0, float(width), float(height))
