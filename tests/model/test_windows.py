"""Window-major order and adaptive windows against loops, patches against torch's strided convolution."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vr_jax.model.windows import (
    MAX_RATIO,
    adaptive_windows,
    average_window,
    largest_window,
    patchify,
    raster_order,
    slot_patches,
    to_raster,
    to_windows,
    window_capacity,
)

GRIDS = [(6, 1), (6, 2), (6, 3), (4, 4)]


def window_major(grid: int, stride: int) -> list[int]:
    n = grid // stride
    return [
        (row * stride + i) * grid + column * stride + j
        for row in range(n)
        for column in range(n)
        for i in range(stride)
        for j in range(stride)
    ]


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_orders(grid: int, stride: int):
    order = window_major(grid, stride)
    assert raster_order(grid, stride).tolist() == order
    raster = np.random.default_rng(0).normal(size=(2, 3, grid * grid, 5))
    windows = to_windows(jnp.asarray(raster), stride)
    assert windows.shape == (2, 3, (grid // stride) ** 2, stride**2, 5)
    np.testing.assert_array_equal(windows.reshape(raster.shape), raster[:, :, order].astype(np.float32))
    np.testing.assert_array_equal(to_raster(windows), raster.astype(np.float32))


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
@pytest.mark.parametrize("remainder", [0, 3])
def test_patchify_is_a_strided_convolution(grid: int, stride: int, remainder: int):
    patch, width = 4, 7
    size = grid * patch + remainder  # e.g. so400m/14-384: 6 pixels are left over
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    kernel = rng.normal(size=(width, 3, patch, patch)).astype(np.float32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2)), torch.from_numpy(kernel), stride=patch
    )
    expected = expected.flatten(2).transpose(1, 2).numpy()[:, window_major(grid, stride)]
    patches = np.asarray(patchify(jnp.asarray(pixels), patch, stride))
    found = patches.reshape(2, grid * grid, -1) @ kernel.transpose(2, 3, 1, 0).reshape(-1, width)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def window_of(rows: int, columns: int, side: int, i: int, j: int) -> list[int]:
    """The patches of a window by the definition, in exact arithmetic."""
    top, bottom = math.floor(i * rows / side), math.ceil((i + 1) * rows / side)
    left, right = math.floor(j * columns / side), math.ceil((j + 1) * columns / side)
    return [row * columns + column for row in range(top, bottom) for column in range(left, right)]


@pytest.mark.parametrize("side", [1, 3, 4, 8])
def test_adaptive_windows(side: int):
    rng = np.random.default_rng(side)
    grids = [(8, 8), (1, 1), (2, 13), (40, 1), *(tuple(rng.integers(1, 13, 2).tolist()) for _ in range(20))]
    slots = max(largest_window(*grid, side) for grid in grids)
    extent = np.array([[*grids, (0, 0)]], np.int32)
    patch, valid = (
        np.asarray(x)[0] for x in jax.jit(functools.partial(adaptive_windows, side=side, slots=slots))(extent)
    )
    assert not valid[-1].any()
    assert not patch[~valid].any()
    for k, (rows, columns) in enumerate(grids):
        windows = [window_of(rows, columns, side, i, j) for i in range(side) for j in range(side)]
        assert [p[v].tolist() for p, v in zip(patch[k], valid[k], strict=True)] == windows
        assert largest_window(rows, columns, side) == max(map(len, windows))
        assert sorted(set().union(*windows)) == list(range(rows * columns))
        if rows == columns:
            assert average_window(rows, side) == pytest.approx(np.mean([len(window) for window in windows]))


def test_windows_of_a_grid_that_divides_are_the_square_ones():
    patch, valid = adaptive_windows(jnp.array([6, 6]), 3, 4)
    assert valid.all()
    assert patch.ravel().tolist() == raster_order(6, 2).tolist()


def test_slot_patches():
    extent = np.array([(2, 3), (0, 0), (7, 1), (0, 5)], np.int32)
    found = slot_patches(extent, 7)
    for k, (rows, columns) in enumerate(extent):
        places = [(row, column) for row in range(rows) for column in range(columns)]
        blank = [(0, 0)] * (7 - len(places))
        assert np.stack([found.row[k], found.column[k]], axis=-1).tolist() == [list(p) for p in places + blank]
        assert found.valid[k].tolist() == [True] * len(places) + [False] * len(blank)


@pytest.mark.parametrize(("patches", "side"), [(1, 3), (24, 3), (64, 4), (121, 8)])
def test_window_capacity(patches: int, side: int):
    grids = [(h, w) for h in range(1, patches + 1) for w in range(1, patches + 1) if h * w <= patches]
    needed = max(largest_window(h, w, side) for h, w in grids if max(h, w) <= MAX_RATIO * min(h, w))
    assert needed <= window_capacity(patches, side) < needed + 8
    assert window_capacity(patches, side) % 8 == 0


def test_window_capacity_of_minicpm_v():
    """44 patches, in whole rows of a register's sublanes; at 60 slots a third of the memory would hold nothing."""
    assert largest_window(7, 165, 8) == 44
    assert window_capacity(34 * 34, 8) == 48
    assert average_window(32, 8) == 16
