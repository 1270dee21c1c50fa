"""Which methods read which layouts of tiles, and that none reads what lies in a tile beyond an image."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tests.model.families import WindowsImage, family_config, family_images
from tests.tiny import PROJECTOR_FIELDS, Text, example, pack, quick, random_model, tiny_decoder, tiny_refusion
from vr_jax.errors import ConfigError
from vr_jax.model import registry
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.projectors.pixel_shuffle import PixelShuffleConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.projectors.resampler import ResamplerConfig
from vr_jax.model.pruning.fastv import FastVConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.windows import patch_places, slot_patches

WINDOWS = "qwen2_5_vl"
# Models of whole windows whose methods are not those of the family.
MIXED = {
    "pool": {"projector": PoolConfig(stride=2)},
    "pixel_shuffle": {"projector": PixelShuffleConfig(stride=2)},
    "mlp": {"projector": MlpConfig()},
    "one token for each window": {"projector": PoolConfig(stride=4)},
    "deepstack": {"refusion": DeepStackConfig(insert_after=(1, 2), levels=(2, 4))},
    "deepstack, patch merger": {"refusion": DeepStackConfig(insert_after=(1,), levels=(2,), merger="qwen3_vl")},
}


@pytest.mark.parametrize("name", quick(MIXED, "deepstack, patch merger"))
def test_methods_that_read_windows_do_not_read_beyond_an_image(name: str):
    """Other pixels beyond the images, and another sample in the row, change no state of a sample."""
    config = family_config(WINDOWS, **MIXED[name])
    question, answer = Text(2, text_token=True), Text(2, target=True)
    samples = [
        example(config, Text(1), WindowsImage(8, 4), question, answer, seed=1),
        example(config, Text(1), WindowsImage(4, 12), Text(1), WindowsImage(4, 4), question, answer, seed=2),
    ]
    if config.projector.stride < 4:
        samples[0] = example(config, Text(1), WindowsImage(6, 10), question, answer, seed=1)
    model, run = random_model(config), jax.jit(lambda model, batch: model(batch)[0])
    size = {"tokens": sum(len(one.tokens) for one in samples), "tiles": 10}
    packed = pack(config, [samples, samples[::-1]], **size)
    found = np.asarray(run(model, packed))

    real = patch_places(config.encoder.grid, 1) < np.asarray(packed.tile_extent)[:, :, None]
    inside = real.all(-1).reshape(2, 10, config.encoder.grid, -1)
    inside = inside.repeat(config.encoder.patch_size, 2).repeat(config.encoder.patch_size, 3)[..., None]
    other = packed.replace(tile_pixels=np.where(inside, packed.tile_pixels, 255 - packed.tile_pixels))
    np.testing.assert_array_equal(run(model, other), found)

    alone = np.asarray(run(model, pack(config, [[one] for one in samples], **size)))
    begin = 0
    for row, one in enumerate(samples):
        part = found[0, begin : begin + len(one.tokens)]
        np.testing.assert_allclose(part, alone[row, : len(one.tokens)], atol=2e-5)
        begin += len(one.tokens)
    moved = np.asarray(run(model, packed.replace(tile_pixels=255 - packed.tile_pixels)))
    assert np.abs(moved - found).max() > 1e-3


SLICES = {
    "vision_remember": {},
    "deepstack": {"refusion": DeepStackConfig(insert_after=(1, 2), levels=(2, 4))},
}


@pytest.mark.parametrize("name", quick(SLICES, "deepstack"))
def test_methods_that_read_slices_do_not_read_beyond_them(name: str):
    """Other pixels beyond the slices, and another sample in the row, change no state of a sample."""
    config = family_config("minicpm_v", **SLICES[name])
    large, small, middle = family_images("minicpm_v")
    question, answer = Text(2, text_token=True), Text(2, target=True)
    samples = [
        example(config, Text(1), large, question, answer, seed=1),
        example(config, Text(1), small, Text(1), middle, question, answer, seed=2),
    ]
    model, run = random_model(config), jax.jit(lambda model, batch: model(batch)[0])
    size = {"tokens": sum(len(one.tokens) for one in samples), "tiles": 7}
    packed = pack(config, [samples, samples[::-1]], **size)
    found = np.asarray(run(model, packed))

    grid, side = config.encoder.grid, config.encoder.patch_size
    inside = slot_patches(packed.tile_extent, grid**2).valid.reshape(2, 7, grid, grid)
    inside = np.asarray(inside).repeat(side, 2).repeat(side, 3)[..., None]
    other = packed.replace(tile_pixels=np.where(inside, packed.tile_pixels, 255 - packed.tile_pixels))
    assert (other.tile_pixels != packed.tile_pixels).any()
    np.testing.assert_array_equal(run(model, other), found)

    alone = np.asarray(run(model, pack(config, [[one] for one in samples], **size)))
    begin = 0
    for row, one in enumerate(samples):
        part = found[0, begin : begin + len(one.tokens)]
        np.testing.assert_allclose(part, alone[row, : len(one.tokens)], atol=2e-5)
        begin += len(one.tokens)


def methods_of(kind: str, layout: str) -> set[str]:
    return {name for name in registry.names(kind) if layout in registry.method(kind, name).layouts}


def test_what_reads_windows():
    assert {"merger", "mlp", "pixel_shuffle", "pool"} <= methods_of("projector", "windows")
    assert methods_of("refusion", "windows") == {"deepstack", "vision_remember"}


def test_what_reads_slices():
    assert methods_of("projector", "raster") == {"resampler"}
    assert methods_of("refusion", "raster") == {"deepstack", "vision_remember"}


@pytest.mark.parametrize("name", ["c_abstractor", "ldpv2", "perceiver", "token_packer"])
def test_projectors_that_need_square_tiles_are_refused(name: str):
    projector = registry.method("projector", name)(**{"stride": 2} | PROJECTOR_FIELDS.get(name, {}))
    with pytest.raises(ConfigError, match=f"projector '{name}' with the encoder 'qwen2_5_vision': .*'square'"):
        family_config(WINDOWS, projector=projector)


REFUSED = {
    "global": (lambda: tiny_refusion(levels=(1, 2, 4), interaction="global"), "reads whole tiles.*set it to 'local'"),
    "deformable": (lambda: tiny_refusion(levels=(1, 2, 4), interaction="deformable"), "interaction = 'deformable'"),
    "sva": (lambda: SvaConfig(levels=(4,), width=16, heads=2), "refusion 'sva' with the encoder .*'square'"),
}


@pytest.mark.parametrize("family", [WINDOWS, "minicpm_v"])
@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_read_whole_tiles_are_refused(name: str, family: str):
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        family_config(family, refusion=make())


@pytest.mark.parametrize("refusion", [tiny_refusion(levels=(1, 2, 4)), DeepStackConfig(insert_after=(1,), levels=(2,))])
def test_operations_of_slices_that_divide_into_windows_are_those_of_square_tiles(refusion):
    """A slot of 6 x 6 patches with 3 x 3 cells, and a tile of as many with a stride of 2."""
    slices = family_config("minicpm_v", refusion=refusion)
    tiles = family_config(
        "llava", refusion=refusion, decoder=slices.decoder, projector=ResamplerConfig(stride=2, heads=2)
    )
    assert tiles.encoder.grid == slices.encoder.grid
    assert slices.refusion.flops_per_tile(slices.spec) == tiles.refusion.flops_per_tile(tiles.spec)
    assert slices.projector.flops_per_tile(slices.spec) == tiles.projector.flops_per_tile(tiles.spec)


def image_of(family: str, **changes: Any) -> ImageConfig:
    return dataclasses.replace(family_config(family).image, **changes)


NO_SENSE = {
    "slices larger than a slot": (
        "minicpm_v",
        lambda: {"image": image_of("minicpm_v", slice_size=28)},
        r"image.slice_size = 28: a square slice has 7 x 7 patches of 4 pixels, but .* room for 6 x 6; lower it",
    ),
    "fewer pixels than a cell": (
        WINDOWS,
        lambda: {"image": image_of(WINDOWS, min_pixels=1, max_pixels=63)},
        "image.max_pixels = 63: an image has at least one cell of 8 x 8 pixels; set at least 64",
    ),
    "one time axis for all tokens of an image": (
        WINDOWS,
        lambda: {"refusion": tiny_refusion(levels=(1, 2, 4), self_positions="rope")},
        "self_positions = 'rope' with decoder.rope_sections: .*same for all tokens of an image.*set it to 'none'",
    ),
}


@pytest.mark.parametrize("name", NO_SENSE)
def test_settings_that_cannot_work_are_refused(name: str):
    family, changes, message = NO_SENSE[name]
    with pytest.raises(ConfigError, match=message):
        family_config(family, **changes())


def test_settings_that_just_work_are_accepted():
    family_config("minicpm_v", image=image_of("minicpm_v", slice_size=26))  # 6.5 patches are rounded to 6
    family_config(WINDOWS, image=image_of(WINDOWS, min_pixels=1, max_pixels=64))
    counted = tiny_decoder(hidden_size=32)
    family_config(WINDOWS, decoder=counted, refusion=tiny_refusion(levels=(1, 2, 4), self_positions="rope"))


@pytest.mark.parametrize(("family", "encoder"), [(WINDOWS, "qwen2_5_vision"), ("minicpm_v", "siglip_slices")])
def test_pruners_are_refused(family: str, encoder: str):
    with pytest.raises(ConfigError, match=f"pruning 'fastv' with the encoder '{encoder}'"):
        family_config(family, refusion=None, pruning=FastVConfig())


@pytest.mark.parametrize("family", [WINDOWS, "minicpm_v"])
def test_a_config_survives_json(family: str):
    config = family_config(family)
    assert VlmConfig.from_dict(config.to_dict()) == config
