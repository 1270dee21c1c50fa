"""A tiny model and a batch of each family of models, for tests of what holds for all of them.

To add a family: a config in `family_config`, its images in `family_images`, and its name in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.tiny import ImagePart, SampleImage, Text, example, pack, tiny_config, tiny_decoder, tiny_refusion
from vr_jax.data.layouts import TokenLayout
from vr_jax.data.types import Example
from vr_jax.model.batch import Batch
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig
from vr_jax.model.projectors.merger import MergerConfig
from vr_jax.model.projectors.resampler import ResamplerConfig

FAMILIES = ("llava", "qwen2_5_vl", "minicpm_v")


@dataclass(frozen=True)
class WindowsImage:
    """An image of rows x columns patches that is cut into the attention windows of Qwen2.5-VL's encoder."""

    rows: int
    columns: int

    def layout(self, config: VlmConfig) -> TokenLayout:
        """The tokens of the image in raster order, and its windows row by row."""
        grid, stride, side = config.encoder.grid, config.projector.stride, config.cells_per_side
        assert self.rows % stride == self.columns % stride == 0
        origin = [(row, column) for row in range(0, self.rows, grid) for column in range(0, self.columns, grid)]
        extent = [(min(grid, self.rows - row), min(grid, self.columns - column)) for row, column in origin]
        place = [(row, column) for row in range(self.rows // stride) for column in range(self.columns // stride)]
        tile = [origin.index((row // side * grid, column // side * grid)) for row, column in place]
        cell = [t * side**2 + row % side * side + column % side for t, (row, column) in zip(tile, place, strict=True)]
        arrays = (np.array(values, np.int32) for values in (cell, place, extent, origin))
        cells, places, extents, origins = arrays
        return TokenLayout(cell=cells, tiles=len(origin), place=places, extent=extents, origin=origins)


@dataclass(frozen=True)
class SlicesImage:
    """An image of slices of MiniCPM-V's encoder, each of a grid (rows, columns) of patches of its own."""

    grids: tuple[tuple[int, int], ...]

    def layout(self, config: VlmConfig) -> TokenLayout:
        """The tokens of the slices, one slice after the other."""
        cells, extents = len(self.grids) * config.cells_per_tile, np.array(self.grids, np.int32)
        assert (extents.prod(axis=1) <= config.spec.patches_per_tile).all()
        return TokenLayout(cell=np.arange(cells, dtype=np.int32), tiles=len(self.grids), extent=extents)


def family_config(name: str, **changes: Any) -> VlmConfig:
    """A tiny model of a family with Vision Remember in it.

    Args:
        name: One of `FAMILIES`.
        **changes: Fields of the config with other values.
    """
    if name == "llava":
        return tiny_config(**changes)
    if name == "minicpm_v":
        return minicpm_config(**changes)
    assert name == "qwen2_5_vl", name
    encoder = Qwen25VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=4,
        num_heads=2,
        image_size=16,
        patch_size=4,
        full_attention_layers=(1, 3),
    )
    base = {
        "encoder": encoder,
        "decoder": tiny_decoder(hidden_size=32, rope_sections=(1, 2, 1)),
        "projector": MergerConfig(),
        "refusion": tiny_refusion(levels=(1, 2, 4)),
        "image": ImageConfig(tile_size=encoder.image_size, aspect_ratio="native", unpad=False),
        "vision_feature_layer": 4,
    }
    return VlmConfig(**base | changes)


def minicpm_config(**changes: Any) -> VlmConfig:
    """A tiny MiniCPM-V, with slots of 36 patches and 3 x 3 queries for each slice."""
    encoder = SiglipSlicesConfig(
        hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, image_size=24, patch_size=4, position_grid=5
    )
    base = {
        "encoder": encoder,
        "decoder": tiny_decoder(embedding_scale=3.0, residual_scale=0.7, logit_scale=0.5, attention_bias=False),
        "projector": ResamplerConfig(queries=3, heads=2),
        "refusion": tiny_refusion(levels=(1, 2, 4)),
        "image": ImageConfig(tile_size=encoder.image_size, aspect_ratio="slices", unpad=False, slice_size=20),
        "vision_feature_layer": 5,
    }
    return VlmConfig(**base | changes)


def family_images(name: str) -> tuple[ImagePart, ImagePart, ImagePart]:
    """A large, a small and a middle image of a family: three, one and two tiles, of which some are partial."""
    if name == "llava":
        return SampleImage(3, crop=1), SampleImage(1), SampleImage(2)
    if name == "minicpm_v":
        return SlicesImage(((4, 7), (5, 5), (5, 5))), SlicesImage(((6, 6),)), SlicesImage(((2, 11), (8, 4)))
    assert name == "qwen2_5_vl", name
    return WindowsImage(2, 10), WindowsImage(4, 4), WindowsImage(6, 4)


def family_rows(name: str, config: VlmConfig) -> list[list[Example]]:
    """Rows with several images in a sample, partial or cropped tiles, a sample of text and a single image."""
    large, small, middle = family_images(name)
    return [
        [
            example(config, Text(3), large, Text(4, text_token=True), Text(3, target=True), seed=1),
            example(config, Text(5, text_token=True), Text(2, target=True), seed=2),
            example(config, Text(2), small, Text(1), middle, Text(3, text_token=True), seed=3),
        ],
        [example(config, Text(2), middle, Text(3), Text(2, target=True), seed=4)],
    ]


def family_batch(name: str, config: VlmConfig | None = None) -> Batch:
    """The rows of `family_rows` with padding and unused tile slots; `config` is `family_config(name)` by default."""
    config = config or family_config(name)
    rows = family_rows(name, config)
    longest = max(sum(len(one.tokens) for one in row) for row in rows)
    return pack(config, rows, tokens=longest + 6)


def without_refusion(config: VlmConfig) -> VlmConfig:
    """The same model without its re-fusion blocks."""
    return dataclasses.replace(config, refusion=None)
