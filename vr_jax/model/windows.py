"""The window-major layout: patches ordered as (cell, patch in cell), a cell being the s x s patches of a token.

The only place that knows how to go between raster and window-major order (design decision 2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float


def patchify(pixels: Float[Array, "*B H W 3"], patch_size: int, stride: int) -> Float[Array, "*B cells patches pixels"]:
    """Non-overlapping patches in window-major order, each flattened as (row, column, channel).

    A remainder of pixels at the right and bottom is dropped, as a strided convolution does."""
    *batch, height, width, channels = pixels.shape
    rows, columns = height // patch_size // stride, width // patch_size // stride
    x = pixels[..., : rows * stride * patch_size, : columns * stride * patch_size, :]
    x = x.reshape(*batch, rows, stride, patch_size, columns, stride, patch_size, channels)
    k = len(batch)
    # (cell row, patch row, pixel row, cell column, patch column, pixel column, channel)
    x = x.transpose(*range(k), k, k + 3, k + 1, k + 4, k + 2, k + 5, k + 6)
    return x.reshape(*batch, rows * columns, stride * stride, patch_size * patch_size * channels)


def to_windows(raster: Float[Array, "*B G*G D"], stride: int) -> Float[Array, "*B cells patches D"]:
    """Raster order (G*G patches, row by row) to window-major."""
    *batch, patches, width = raster.shape
    grid = round(patches**0.5)
    n, k = grid // stride, len(batch)
    x = raster.reshape(*batch, n, stride, n, stride, width)
    x = x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    return x.reshape(*batch, n * n, stride * stride, width)


def to_raster(windows: Float[Array, "*B cells patches D"]) -> Float[Array, "*B G*G D"]:
    """Window-major to raster order; the inverse of `to_windows`."""
    *batch, cells, patches, width = windows.shape
    n, stride, k = round(cells**0.5), round(patches**0.5), len(batch)
    x = windows.reshape(*batch, n, n, stride, stride, width)
    x = x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4)
    return x.reshape(*batch, cells * patches, width)


def raster_order(grid: int, stride: int) -> np.ndarray:
    """Indices p with `raster[p]` in window-major order, flat: (G*G,)."""
    order = np.arange(grid * grid).reshape(-1, 1)
    return np.asarray(to_windows(order, stride)).reshape(-1)  # type: ignore[arg-type]
