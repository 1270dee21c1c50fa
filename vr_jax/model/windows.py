"""The window-major layout, in which patches are ordered as (cell, patch in cell).

A cell is the window of stride x stride patches of one vision token. This module alone converts between raster order and
window-major order (docs/design/decisions.md#decision-5).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int, Shaped


def patchify(pixels: Float[Array, "*B H W 3"], patch_size: int, stride: int) -> Float[Array, "*B cells patches pixels"]:
    """Cuts images into patches.

    A remainder of pixels at the right and bottom is dropped, as by a strided convolution.

    Args:
        pixels: Images.
        patch_size: Pixels per side of a patch.
        stride: Patches per side of a window.

    Returns:
        The patches in window-major order, each flattened as (row, column, channel).
    """
    *batch, height, width, channels = pixels.shape
    rows, columns = height // patch_size // stride, width // patch_size // stride
    x = pixels[..., : rows * stride * patch_size, : columns * stride * patch_size, :]
    x = x.reshape(*batch, rows, stride, patch_size, columns, stride, patch_size, channels)
    k = len(batch)
    # The axes are cell row, patch row, pixel row, cell column, patch column, pixel column and channel.
    x = x.transpose(*range(k), k, k + 3, k + 1, k + 4, k + 2, k + 5, k + 6)
    return x.reshape(*batch, rows * columns, stride * stride, patch_size * patch_size * channels)


def to_windows(raster: Shaped[Array, "*B P D"], stride: int) -> Shaped[Array, "*B cells patches D"]:
    """Reorders the P patches of a square map from raster order, row by row, to window-major order."""
    *batch, patches, width = raster.shape
    grid = round(patches**0.5)
    n, k = grid // stride, len(batch)
    x = raster.reshape(*batch, n, stride, n, stride, width)
    x = x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    return x.reshape(*batch, n * n, stride * stride, width)


def to_raster(windows: Float[Array, "*B cells patches D"]) -> Float[Array, "*B P D"]:
    """Reorders patches from window-major order to raster order; the inverse of `to_windows`."""
    *batch, cells, patches, width = windows.shape
    n, stride, k = round(cells**0.5), round(patches**0.5), len(batch)
    x = windows.reshape(*batch, n, n, stride, stride, width)
    x = x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    return x.reshape(*batch, cells * patches, width)


def raster_order(grid: int, stride: int) -> Int[np.ndarray, " P"]:
    """The indices that bring a raster of grid x grid patches to window-major order: raster[raster_order(...)]."""
    n = grid // stride
    order = np.arange(grid * grid).reshape(n, stride, n, stride)
    return order.transpose(0, 2, 1, 3).reshape(-1)


def patch_places(grid: int, stride: int) -> Int[np.ndarray, "P 2"]:
    """The row and column of each of grid x grid patches in window-major order."""
    return np.stack(np.divmod(raster_order(grid, stride), grid), axis=-1).astype(np.int32)
