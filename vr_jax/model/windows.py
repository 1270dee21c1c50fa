"""The window-major layout, in which patches are ordered as (cell, patch in cell), and adaptive windows.

A cell is the window of stride x stride patches of one vision token. This module alone converts between raster order and
window-major order (docs/design/decisions.md#decision-5).

Where a tile slot holds a slice of any grid of patches (the layout "raster"), the windows of n x n cells have no common
size: on a grid of h x w patches cell (i, j) has the rows floor(i h / n) .. ceil((i + 1) h / n) - 1, and the columns in
the same way. Windows overlap where n does not divide a side, and share rows where h < n.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vr_jax.pytree import array_dataclass

# `window_capacity` counts grids whose sides have at most this ratio, because the largest window grows with the ratio:
# of 8 x 8 windows on 34 * 34 patches it is 36 up to a ratio of 8, 44 up to 24, and 52 up to 40.
MAX_RATIO = 24
# The capacity is a multiple of the rows of a register, so that an array (windows, slots, width) lies in memory as its
# rows do.
_SUBLANES = 8


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


@array_dataclass
class SlotPatches:
    """Where the patches of slots lie on the grids of their slices.

    Attributes:
        row: Row of each patch; 0 beyond the slice's patches.
        column: Column of each patch; 0 beyond the slice's patches.
        valid: Whether there is a patch.
    """

    row: Int[Array, "*B P"]
    column: Int[Array, "*B P"]
    valid: Bool[Array, "*B P"]


def slot_patches(extent: Int[Array, "*B 2"], patches: int) -> SlotPatches:
    """Returns where the `patches` patches of slots lie, which hold slices of `extent` rows and columns row by row."""
    rows, columns = extent[..., :1], jnp.maximum(extent[..., 1:], 1)
    number = jnp.arange(patches)
    row, column = jnp.broadcast_arrays(number // columns, number % columns)
    valid = number < rows * extent[..., 1:]
    return SlotPatches(row=jnp.where(valid, row, 0), column=jnp.where(valid, column, 0), valid=valid)


def window_bounds(size: Int[Array, "*B"] | int, side: int) -> tuple[Int[Array, "*B n"], Int[Array, "*B n"]]:
    """Returns the first position and the end of each of `side` windows along an axis of `size` patches."""
    index, size = jnp.arange(side), jnp.asarray(size)[..., None]
    return index * size // side, -(-(index + 1) * size // side)


def adaptive_windows(
    extent: Int[Array, "*B 2"], side: int, slots: int
) -> tuple[Int[Array, "*B C S"], Bool[Array, "*B C S"]]:
    """Returns the patches of the adaptive windows of slices.

    Args:
        extent: Rows and columns of the slices.
        side: Cells per side, n; C is n * n.
        slots: Patch slots S of a window; `window_capacity`.

    Returns:
        The number of each patch in its slot, row by row within a window, and whether there is one; other numbers are 0.
    """
    top, bottom = (bound[..., :, None] for bound in window_bounds(extent[..., 0], side))
    left, right = (bound[..., None, :] for bound in window_bounds(extent[..., 1], side))
    width = jnp.broadcast_to(right - left, (*extent.shape[:-1], side, side)).reshape(*extent.shape[:-1], side**2, 1)
    first = (top * extent[..., 1, None, None] + left).reshape(width.shape)
    count = ((bottom - top) * (right - left)).reshape(width.shape)
    slot = jnp.arange(slots)
    divisor = jnp.maximum(width, 1)
    valid = slot < count
    patch = first + slot // divisor * extent[..., 1, None, None] + slot % divisor
    return jnp.where(valid, patch, 0), valid


def largest_window(rows: int, columns: int, side: int) -> int:
    """Returns the number of patches of the largest of side x side adaptive windows on a grid."""
    return _largest(rows, side) * _largest(columns, side)


@functools.cache
def window_capacity(patches: int, side: int) -> int:
    """Returns the patch slots that the adaptive windows of any grid of at most `patches` patches need.

    Grids whose sides have a ratio above `MAX_RATIO` do not count. A slice of such a grid fits too if its
    `largest_window` is no larger than this.

    Args:
        patches: Patches of a slot.
        side: Cells per side.
    """
    largest = max(
        largest_window(short, long, side)
        for short in range(1, int(patches**0.5) + 1)
        for long in range(short, min(patches // short, MAX_RATIO * short) + 1)
    )
    return -(-largest // _SUBLANES) * _SUBLANES


def average_window(grid: int, side: int) -> float:
    """Returns the mean number of patches of the adaptive windows on a square grid."""
    index = np.arange(side)
    return float(np.mean(-(-(index + 1) * grid // side) - index * grid // side)) ** 2


@functools.cache
def _largest(size: int, side: int) -> int:
    index = np.arange(side)
    return int(np.max(-(-(index + 1) * size // side) - index * size // side))
