"""Tiles and vision tokens of images of any size, compared with torch's interpolation and with PIL."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vr_jax.data import anyres
from vr_jax.model.batch import NEWLINE
from vr_jax.model.config import ImageConfig, anyres4, anyres9, anyres9_all36, single_tile

sides = st.integers(1, 4000)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.sampled_from([6, 8, 12]))
def test_bilinear_layout_is_torch_interpolate(width, height, u):
    """The four cells and weights give torch's bilinear interpolation of the unpadded map, whatever the size."""
    config = anyres9_all36()
    found = anyres.layout((width, height), u, config)
    columns, rows = found.grid
    features = np.random.default_rng(u).random((found.tiles * u * u, 3), np.float32)
    grid = features[u * u :].reshape(rows, columns, u, u, 3).swapaxes(1, 2).reshape(rows * u, columns * u, 3)
    (top, bottom), (left, right) = anyres.unpadded((width, height), (columns * u, rows * u), "truncate")
    expected = torch.from_numpy(grid[top:bottom, left:right].copy()).permute(2, 0, 1)
    _, h, w = expected.shape
    shrink = (h * w / (9 * u * u)) ** 0.5
    if shrink > 1.1:
        size = [int(h // shrink), int(w // shrink)]
        expected = torch.nn.functional.interpolate(expected[None], size, mode="bilinear")[0]
        packed = np.einsum("nk,nkd->nd", found.weights, features[found.cells])
    else:
        assert found.cells is None
        packed = np.where(found.cell[:, None] >= 0, features[found.cell], 0)
    np.testing.assert_array_equal(packed[: u * u], features[: u * u])
    rest = packed[u * u :].reshape(expected.shape[1], expected.shape[2] + 1, 3)
    # Positions up to 70 in float32: torch builds without a fused multiply-add round them by another 2e-6.
    np.testing.assert_allclose(rest[:, :-1], expected.permute(1, 2, 0), rtol=0, atol=5e-6)
    assert np.all(found.cell[u * u :].reshape(rest.shape[:2])[:, -1] == NEWLINE)


@settings(deadline=None, max_examples=200)
@given(sides, sides)
def test_every_size_stays_within_the_declared_bounds(width, height):
    for config in (anyres4(), anyres9()):
        found = anyres.layout((width, height), 8, config)
        assert found.tiles <= config.max_tiles_per_image
        assert found.cells is None
        cells = found.cell[found.cell >= 0]
        assert len(np.unique(cells)) == len(cells)
        assert cells.max() < found.tiles * 64
        w, h = anyres.fitted_size((width, height), (found.grid[0] * 384, found.grid[1] * 384))
        assert 0 < w <= found.grid[0] * 384
        assert 0 < h <= found.grid[1] * 384


def test_token_counts_of_methods_1_3():
    assert len(anyres.layout((640, 480), 8, anyres4()).cell) == 268
    assert len(anyres.layout((1700, 2200), 8, anyres4()).cell) == 272
    assert anyres.layout((1700, 2200), 8, anyres9()).grid == (3, 3)
    full = anyres.layout((1700, 2200), 8, anyres9_all36())
    assert (full.tiles, len(full.cell)) == (31, 636)


def test_rounding_of_transformers_differs_where_it_should():
    """(1128, 799) on a 3 x 3 grid of 24 cells: int(50.99..) against int(round(51.0, 7))."""
    truncated = anyres.layout((1128, 799), 24, anyres9())
    rounded = anyres.layout((1128, 799), 24, ImageConfig(**(vars(anyres9()) | {"unpad_rounding": "round7"})))
    assert len(truncated.cell) == 4226
    assert len(rounded.cell) != len(truncated.cell)


def test_single_tiles_and_newlines():
    base = np.arange(16)
    plain = anyres.layout((50, 20), 4, single_tile())
    np.testing.assert_array_equal(plain.cell, base)
    unpad = anyres.layout((50, 20), 4, single_tile(unpad=True))
    np.testing.assert_array_equal(unpad.cell, [*base, NEWLINE])
    several = anyres.layout((50, 20), 4, anyres9(), alone=False)
    np.testing.assert_array_equal(several.cell, [*base, NEWLINE])
    assert (plain.tiles, unpad.tiles, several.tiles) == (1, 1, 1)


def test_without_unpad_the_whole_map_is_kept_row_by_row():
    config = ImageConfig(aspect_ratio="anyres", grids=((2, 1),), unpad=False)
    found = anyres.layout((900, 300), 2, config)
    np.testing.assert_array_equal(found.cell, [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11])


def test_layouts_are_shared_and_read_only():
    found = anyres.layout((640, 480), 8, anyres9())
    assert found is anyres.layout((640, 480), 8, anyres9())
    with pytest.raises(ValueError, match="read-only"):
        found.cell[0] = 1


@pytest.mark.usefixtures("pillow_13")
@pytest.mark.parametrize("size", [(100, 30), (30, 100), (64, 64), (7, 300), (1, 1), (97, 31)])
def test_tiles_are_the_pasted_canvas_cut_up(size):
    """Against the official two steps, done with PIL: paste the resized image on black, crop the tiles."""
    config = ImageConfig(tile_size=32, aspect_ratio="anyres", grids=((1, 1), (2, 1), (1, 3), (3, 2)))
    pixels = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    columns, rows = anyres.select_grid(size, config.grids, 32)
    fitted = image.resize(anyres.fitted_size(size, (columns * 32, rows * 32)))
    canvas = Image.new("RGB", (columns * 32, rows * 32), (0, 0, 0))
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    expected = [np.asarray(image.resize((32, 32)))]
    for y in range(0, canvas.height, 32):
        expected += [np.asarray(canvas.crop((x, y, x + 32, y + 32))) for x in range(0, canvas.width, 32)]
    np.testing.assert_array_equal(anyres.tiles(image, config), expected)
