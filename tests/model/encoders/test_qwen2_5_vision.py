"""What Qwen2.5-VL's vision tower promises beside its numbers.

These are compared with transformers in tests/golden/test_vr_qwen2_5_vl.py and tests/model/test_qwen2_5_vl.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.families import WindowsImage, family_config
from tests.tiny import Text, example, pack, randomized
from vr_jax.errors import ConfigError
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.model.windows import patch_places

CONFIG = family_config("qwen2_5_vl")
LEVELS = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def encoder():
    return randomized(abstract_model(CONFIG)).encoder


@pytest.fixture(scope="module")
def batch():
    """Two images in one row, of which one has partial windows at the right and bottom, and a row without images."""
    rows = [
        [example(CONFIG, WindowsImage(6, 6), Text(1), WindowsImage(4, 8), seed=1)],
        [example(CONFIG, Text(3), seed=2)],
    ]
    return pack(CONFIG, rows)


@jax.jit
def states_of(encoder, pixels, places):
    return encoder(pixels, LEVELS, places)


def real_of(batch) -> np.ndarray:
    """The mask of patches that images have, (B, T, cells, patches)."""
    within = patch_places(CONFIG.encoder.grid, CONFIG.projector.stride)
    real = (within < np.asarray(batch.tile_extent)[:, :, None]).all(-1)
    return real.reshape(*real.shape[:2], CONFIG.cells_per_tile, -1)


def test_pixels_beyond_an_image_do_not_matter(encoder, batch):
    pixels, real = np.array(batch.tile_pixels), real_of(batch)
    assert 0 < real.mean() < 0.5
    patch, grid = CONFIG.encoder.patch_size, CONFIG.encoder.grid
    # The mask in raster order, pixel by pixel.
    raster = np.zeros((*real.shape[:2], grid, grid), bool)
    rows, columns = patch_places(grid, CONFIG.projector.stride).T
    raster[:, :, rows, columns] = real.reshape(*real.shape[:2], -1)
    inside = raster.repeat(patch, axis=2).repeat(patch, axis=3)[..., None]
    for padding in (0, 255):
        other = states_of(encoder, np.where(inside, pixels, np.uint8(padding)), batch.tile_places)
        for state, expected in zip(other, states_of(encoder, pixels, batch.tile_places), strict=True):
            np.testing.assert_array_equal(np.asarray(state)[real], np.asarray(expected)[real])
            assert np.isfinite(state).all()


def test_only_layers_of_full_attention_see_other_windows_and_none_sees_other_images(encoder, batch):
    """A change of the first window reaches level 1 there, and from the full layer 1 on the rest of its image."""
    changed = np.array(batch.tile_pixels)
    changed[0, 0] = 255 - changed[0, 0]
    before = states_of(encoder, batch.tile_pixels, batch.tile_places)
    after = states_of(encoder, changed, batch.tile_places)
    real = real_of(batch)
    changes = [np.asarray(x != y).any(-1) & real for x, y in zip(before, after, strict=True)]
    differs = [[change[0, tile].any() for tile in range(6)] for change in changes]
    window, image = [True] + [False] * 5, [True] * 4 + [False] * 2
    assert differs == [window, window, image, image]
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[1], y[1])


def test_the_place_of_a_window_in_its_image_matters(encoder, batch):
    """Angles are relative within a window, so that its place shows in the layers of full attention."""
    moved = dataclasses.replace(batch.tile_places, origin=batch.tile_places.origin.at[0, 1].add(4))
    before = states_of(encoder, batch.tile_pixels, batch.tile_places)
    after = states_of(encoder, batch.tile_pixels, moved)
    np.testing.assert_allclose(np.asarray(after[1])[0, 1], np.asarray(before[1])[0, 1], atol=2e-5)
    assert np.abs(np.asarray(after[2])[0, 0] - np.asarray(before[2])[0, 0]).max() > 1e-2


def test_layers_beyond_the_deepest_level_do_not_run(encoder, batch):
    broken = jax.tree.map(lambda x: x, encoder)
    broken.stages[-1] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), encoder.stages[-1])
    (state,) = jax.jit(lambda e, batch: e(batch.tile_pixels, (2,), batch.tile_places))(broken, batch)
    expected = states_of(encoder, batch.tile_pixels, batch.tile_places)[2]
    np.testing.assert_allclose(state, expected, atol=1e-6)


def test_the_stages_end_at_levels_and_around_layers_of_full_attention():
    assert CONFIG.encoder_bounds == (0, 1, 2, 3, 4)
    image = dataclasses.replace(CONFIG.image, tile_size=112)
    released = family_config(
        "qwen2_5_vl", encoder=Qwen25VisionConfig(), image=image, vision_feature_layer=32, refusion=None
    )
    assert released.encoder_bounds == (0, 7, 8, 15, 16, 23, 24, 31, 32)


def test_operations_of_a_tile():
    """By hand for the tiny model: 16 patches of 48 values, 16 channels, 24 inner channels, 2 of 4 layers full."""
    config = CONFIG.encoder
    embed, layer = 2 * 16 * 48 * 16, 2 * 16 * (4 * 16 * 16 + 3 * 16 * 24)
    assert config.flops_per_tile(0) == embed
    assert config.flops_per_tile(4) == embed + 4 * (layer + 4 * 16 * 16 * 16)
    assert config.flops_per_tile(2, image_tiles=5) == embed + 2 * layer + (1 + 5) * 4 * 16 * 16 * 16


def test_what_is_refused(encoder, batch):
    with pytest.raises(ValueError, match=r"\[5\] of 'qwen2_5_vision' are not stage bounds \(0, 1, 2, 3, 4\)"):
        encoder(batch.tile_pixels, (5,), batch.tile_places)
    with pytest.raises(ValueError, match="needs the places of tiles"):
        encoder(batch.tile_pixels, (4,))
    with pytest.raises(ConfigError, match="'qwen2_5_vision' does not give the attention that patches receive"):
        encoder.received_attention(jnp.zeros((1, 1, 4, 4, 16)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "hidden_size = 1280 with num_heads = 3"),
        ({"num_heads": 640}, "a multiple of 4 channels"),
        ({"image_size": 100}, "image_size = 100: expected a window of whole patches, a multiple of patch_size = 14"),
        ({"full_attention_layers": (7, 32)}, r"\[32\] outside the encoder; expected values in 0\.\.31"),
        ({"full_attention_layers": (7, 7)}, "no element twice"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message: str):
    with pytest.raises(ConfigError, match=message):
        Qwen25VisionConfig(**changes)
