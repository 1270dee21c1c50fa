"""The window of every vision token lies on the image where the map of the whole image shows its patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.app.made_up import weights
from tests.model.families import family_config
from tests.tiny import quick, tiny_config, tiny_encoder
from vr_jax.app.windows import windows
from vr_jax.data import tiling
from vr_jax.evaluation import attention_maps, of_image, placed_tiles
from vr_jax.model.config import ImageConfig
from vr_jax.model.projectors.pool import PoolConfig

# Tiles of 48 x 48 pixels with 4 x 4 cells of 3 x 3 patches.
ANYRES = tiny_config(
    encoder=tiny_encoder(image_size=48),
    projector=PoolConfig(stride=3),
    image=ImageConfig(tile_size=48, aspect_ratio="anyres", grids=((1, 2), (2, 1), (2, 2), (3, 1))),
)
CONFIGS = {"anyres": ANYRES, "qwen2_5_vl": family_config("qwen2_5_vl"), "minicpm_v": family_config("minicpm_v")}
SIZES = [(96, 48), (401, 170), (70, 133), (200, 200), (50, 50)]


def slots_of(config):
    return config.window_slots or (config.encoder.grid // config.cells_per_side) ** 2


def map_of(found, size, config, base):
    """The map of the whole image, as evaluation draws it."""
    place, _ = placed_tiles(found, size, config, base=base)
    values = np.asarray(found[0].weights)
    if config.encoder.layout == "raster":
        extent = tiling.layout(size, config).extent
        relative = attention_maps.slice_weights(values[: len(extent)], extent)
    else:
        relative = attention_maps.relative_weights(values)
    return attention_maps.on_image(relative, place, size, config)


@pytest.mark.parametrize("base", [False, True], ids=["grid", "overview"])
@pytest.mark.parametrize("family", quick(CONFIGS, "anyres", "qwen2_5_vl"))  # Adaptive windows are compiled by size.
def test_each_window_shows_the_weights_of_its_token_where_the_map_does(family, base):
    """One token alone has weights, so that overlapping windows are not averaged. Pixels at edges are left out."""
    config = CONFIGS[family]
    for size in SIZES:
        whole = weights(config, [size], slots_of(config))
        shown = windows(whole, size, config, base=base)
        assert shown
        for one in shown[:: max(1, len(shown) // 5)]:
            alone = np.zeros_like(whole[0].weights)
            alone[one.tile, one.cell] = whole[0].weights[one.tile, one.cell]
            found = tuple(dataclasses.replace(reread, weights=alone) for reread in whole)
            drawn = map_of(found, size, config, base)
            ratios = one.ratios(np.asarray(whole[0].weights))
            left, top, right, bottom = one.box
            y, x = ((np.arange(extent) + 0.5) / extent for extent in drawn.shape)
            row, column = (y - top) / (bottom - top) * ratios.shape[0], (x - left) / (right - left) * ratios.shape[1]
            inside = ((row >= 0) & (row < ratios.shape[0]))[:, None] & (column >= 0) & (column < ratios.shape[1])
            sure = (np.abs(row - row.round()) > 0.1)[:, None] & (np.abs(column - column.round()) > 0.1)
            rows, columns = (
                np.clip(part.astype(int), 0, count - 1)
                for part, count in ((row, ratios.shape[0]), (column, ratios.shape[1]))
            )
            expected = ratios[rows[:, None], columns]
            np.testing.assert_allclose(drawn[inside & sure], expected[inside & sure], rtol=1e-5)
            outside = ~inside & sure
            assert np.isnan(drawn[outside]).all(), f"{family} {size}: weights lie outside of the window"


def test_tokens_are_numbered_over_the_whole_image():
    size = (96, 48)  # two tiles side by side
    shown = windows(weights(ANYRES, [size], 9), size, ANYRES)
    assert sorted((one.row, one.column) for one in shown) == [(row, column) for row in range(4) for column in range(8)]
    last = next(one for one in shown if (one.row, one.column) == (3, 7))
    np.testing.assert_allclose(last.box, (7 / 8, 3 / 4, 1, 1))
    assert (last.tile, last.cell, last.patches) == (2, 15, (3, 3))


def test_cropped_tokens_have_no_window():
    """Tokens in the padding of a wide image do not exist."""
    size = (401, 100)
    found = weights(ANYRES, [size], 9)
    tokens = sum(cell >= 16 for cell in tiling.layout(size, ANYRES).cell)
    assert 0 < len(windows(found, size, ANYRES)) == tokens


def test_a_later_image_has_the_weights_behind_those_of_the_earlier_ones():
    sizes = [(96, 48), (200, 200)]
    found = weights(ANYRES, sizes, 9)
    assert len(found[0].weights) == 2, "images of a sample with several have one tile each"
    second = of_image(found, sizes, 1, ANYRES)
    np.testing.assert_array_equal(second[0].weights, found[0].weights[1:])
    np.testing.assert_array_equal(second[1].update, found[1].update[1:])
    (alone,) = {one.tile for one in windows(second, sizes[1], ANYRES, alone=False)}
    assert alone == 0
