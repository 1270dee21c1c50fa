"""Tiny models and packed rows shared by the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.data.collate import collate
from vr_jax.data.types import Example
from vr_jax.model.batch import NEWLINE, NO_CELL, Batch, BatchShape
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.sharding import path_of


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test that takes long for each: all but the chosen ones are marked slow."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny_vision(**changes) -> SiglipConfig:
    """6 x 6 patches of 4 pixels, four blocks."""
    base = SiglipConfig(hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, image_size=24, patch_size=4)
    return dataclasses.replace(base, **changes)


def tiny_text(**changes) -> Qwen2Config:
    """Four layers, two query heads for each of two key heads."""
    base = Qwen2Config(vocab_size=40, hidden_size=24, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2)
    return dataclasses.replace(base, **changes)


def tiny_refusion(**changes) -> VisionRememberConfig:
    """Two insertions, three levels, inner width 48 in four heads."""
    return VisionRememberConfig(**{"insert_after": (1, 3), "levels": (1, 2, 3), "cross_heads": 4} | changes)


def tiny_config(**changes) -> VlmConfig:
    """Tiles of 3 x 3 cells of 2 x 2 patches; with Vision Remember unless `refusion` says otherwise."""
    vision = changes.pop("encoder", tiny_vision())
    base = {
        "encoder": vision,
        "decoder": tiny_text(),
        "projector": PoolConfig(stride=2),
        "refusion": tiny_refusion(),
        "image": ImageConfig(tile_size=vision.image_size, aspect_ratio="anyres", grids=((2, 1), (1, 2), (2, 2))),
        "vision_feature_layer": 3,
    }
    return VlmConfig(**base | changes)


def params_of(module) -> dict[str, np.ndarray]:
    """Dot-joined path -> array of every parameter."""
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(module)}


def with_params[Module](module: Module, values: Mapping[str, np.ndarray]) -> Module:
    """The (possibly abstract) module with every parameter replaced; names and shapes must agree exactly."""
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
    assert shapes == {name: np.shape(value) for name, value in values.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(values[path_of(path)], leaf.dtype), module)


def randomized[Module](module: Module, seed: int = 0, scale: float = 0.3) -> Module:
    """The (possibly abstract) module with random values everywhere: initial zeros and ones would hide errors."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]):
        noise = rng.normal(size=shape) * scale
        return jnp.asarray(1 + noise if path.endswith("scale") else noise, jnp.float32)

    return jax.tree_util.tree_unflatten(tree, [draw(path_of(path), leaf.shape) for path, leaf in leaves])


@dataclass(frozen=True)
class Text:
    """`count` random tokens; guide: the text-guided token may pool them; target: they are answers."""

    count: int
    text_token: bool = False
    target: bool = False


@dataclass(frozen=True)
class SampleImage:
    """One tile and a newline; or a base tile and a row of `tiles` - 1 others with a newline after each row of cells,
    of which `crop` are dropped at the top and at the bottom, as unpad does."""

    tiles: int = 1
    crop: int = 0

    def cells(self, side: int) -> list[int]:
        base = list(range(side * side))
        if self.tiles == 1:
            return [*base, NEWLINE]
        for row in range(self.crop, side - self.crop):
            base += [t * side * side + row * side + column for t in range(1, self.tiles) for column in range(side)]
            base.append(NEWLINE)
        return base


def example(config: VlmConfig, *parts: Text | SampleImage, seed: int = 0) -> Example:
    """A sample of random text and noise images, in the given order."""
    rng = np.random.default_rng(seed)
    tokens, cells, text_token, target, tile_image = [], [], [], [], []
    for part in parts:
        if isinstance(part, Text):
            count, layout = part.count, [NO_CELL] * part.count
            tokens += rng.integers(1, config.decoder.vocab_size, count).tolist()
            text_token += [part.text_token] * count
            target += [part.target] * count
        else:
            offset = len(tile_image) * config.cells_per_tile
            layout = [c + offset if c >= 0 else c for c in part.cells(config.cells_per_side)]
            tile_image += [max(tile_image, default=0) + 1] * part.tiles
            tokens += [0] * len(layout)
            text_token += [False] * len(layout)
            target += [False] * len(layout)
        cells += layout
    size = config.image.tile_size
    return Example(
        id=f"example-{seed}",
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array(target, bool),
        text_token_mask=np.array(text_token, bool),
        vision_cell=np.array(cells, np.int32),
        tile_pixels=rng.integers(0, 256, (len(tile_image), size, size, 3), dtype=np.uint8),
        tile_image=np.array(tile_image, np.int32),
        cells_per_tile=config.cells_per_tile,
    )


def pack(
    config: VlmConfig,
    rows: Sequence[Sequence[Example]],
    *,
    tokens: int | None = None,
    tiles: int | None = None,
    pad_side: Literal["right", "left"] = "right",
) -> Batch:
    """Rows of examples as one Batch, as small as they allow unless told otherwise."""
    shape = BatchShape(
        rows=len(rows),
        tokens=tokens or max(sum(len(e.tokens) for e in row) for row in rows),
        tiles=tiles or max(1, *(sum(len(e.tile_image) for e in row) for row in rows)),
        tile_size=config.image.tile_size,
    )
    return jax.tree.map(jnp.asarray, collate(rows, shape, pad_side).batch)
