"""Window-major order against loops and torch's strided convolution."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vr_jax.model.windows import patchify, raster_order, to_raster, to_windows

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
