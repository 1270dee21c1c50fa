"""The one factory of tiny models, packed rows and random parameters for the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vr_jax.data.collate import collate
from vr_jax.data.layouts import TokenLayout
from vr_jax.data.positions import multi_axis_positions
from vr_jax.data.types import Example
from vr_jax.model import registry
from vr_jax.model.batch import NEWLINE, NO_CELL, Batch, BatchShape
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.sharding import path_of

# The fields that a projector of tiny widths needs beside its stride.
PROJECTOR_FIELDS: dict[str, dict[str, Any]] = {
    "perceiver": {"heads": 2, "head_dim": 4, "depth": 2},
    "token_packer": {"levels": (1, 2), "width": 12, "heads": 2},
    "c_abstractor": {"depth": 1},
    "resampler": {"heads": 2},
}


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test that takes long for each of them: all but the chosen ones are marked slow."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny_encoder(**changes: Any) -> SiglipConfig:
    """An encoder of four layers on 6 x 6 patches of 4 pixels."""
    base = SiglipConfig(hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, image_size=24, patch_size=4)
    return dataclasses.replace(base, **changes)


def tiny_decoder(**changes: Any) -> TransformerConfig:
    """A decoder of four layers with two query heads for each of two key heads."""
    base = TransformerConfig(
        vocab_size=40, hidden_size=24, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2
    )
    return dataclasses.replace(base, **changes)


def tiny_projector(name: str, stride: int = 2, **changes: Any) -> ProjectorConfig:
    """A projector of tiny widths by its name; `stride` is ignored by the one that does not compress."""
    fields = {} if name == "mlp" else {"stride": stride}
    return registry.method("projector", name)(**fields | PROJECTOR_FIELDS.get(name, {}) | changes)


def tiny_refusion(**changes: Any) -> VisionRememberConfig:
    """Vision Remember with two insertions and three levels; its inner width is 48, in four heads."""
    return VisionRememberConfig(**{"insert_after": (1, 3), "levels": (1, 2, 3), "cross_heads": 4} | changes)


def tiny_config(**changes: Any) -> VlmConfig:
    """A model with tiles of 3 x 3 cells of 2 x 2 patches, and with Vision Remember unless `refusion` says otherwise."""
    encoder = changes.pop("encoder", tiny_encoder())
    base = {
        "encoder": encoder,
        "decoder": tiny_decoder(),
        "projector": PoolConfig(stride=2),
        "refusion": tiny_refusion(),
        "image": ImageConfig(tile_size=encoder.image_size, aspect_ratio="anyres", grids=((2, 1), (1, 2), (2, 2))),
        "vision_feature_layer": 3,
    }
    return VlmConfig(**base | changes)


def random_model(config: VlmConfig, seed: int = 0, scale: float = 0.3) -> VisionLanguageModel:
    """A model with random values everywhere, see `randomized`."""
    return randomized(abstract_model(config), seed, scale)


def abstract_projector(config: VlmConfig) -> Any:
    """The projector of a model with the shapes of its parameters in place of arrays."""
    return nnx.eval_shape(lambda: config.projector.build(config.spec, rngs=nnx.Rngs(0)))


def params_of(module: Any) -> dict[str, np.ndarray]:
    """Every parameter of a module by its dot-joined path."""
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(module)}


def with_params[Module](module: Module, values: Mapping[str, np.ndarray]) -> Module:
    """A module, abstract or not, with every parameter replaced; names and shapes must agree exactly."""
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(module)}
    assert shapes == {name: np.shape(value) for name, value in values.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(values[path_of(path)], leaf.dtype), module)


def randomized[Module](module: Module, seed: int = 0, scale: float = 0.3) -> Module:
    """A module, abstract or not, with random values everywhere, because initial zeros and ones would hide errors."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]):
        noise = rng.normal(size=shape) * scale
        return jnp.asarray(1 + noise if path.endswith("scale") else noise, jnp.float32)

    return jax.tree_util.tree_unflatten(tree, [draw(path_of(path), leaf.shape) for path, leaf in leaves])


@dataclass(frozen=True)
class Text:
    """Random tokens of a sample.

    Attributes:
        count: Their number.
        text_token: Whether the text-guided token may pool them.
        target: Whether they are an answer.
    """

    count: int
    text_token: bool = False
    target: bool = False


@dataclass(frozen=True)
class SampleImage:
    """An image of a sample: one tile and a newline, or a base tile and a row of other tiles.

    With several tiles, a newline follows each row of cells.

    Attributes:
        tiles: Number of tiles.
        crop: Number of rows of cells that are dropped at the top and at the bottom, as unpad does.
    """

    tiles: int = 1
    crop: int = 0

    def layout(self, config: VlmConfig) -> TokenLayout:
        """The tokens and tiles of the image."""
        return TokenLayout(cell=np.array(self._cells(config.cells_per_side), np.int32), tiles=self.tiles)

    def _cells(self, side: int) -> list[int]:
        """The cell of each token of the image, for tiles of side x side cells."""
        base = list(range(side * side))
        if self.tiles == 1:
            return [*base, NEWLINE]
        for row in range(self.crop, side - self.crop):
            base += [t * side * side + row * side + column for t in range(1, self.tiles) for column in range(side)]
            base.append(NEWLINE)
        return base


class ImagePart(Protocol):
    """An image of a sample; tests/model/families.py has those of other families."""

    def layout(self, config: VlmConfig) -> TokenLayout:
        """The tokens and tiles of the image."""
        ...


def example(config: VlmConfig, *parts: Text | ImagePart, seed: int = 0) -> Example:
    """A sample of random text and images of noise, in the given order."""
    rng = np.random.default_rng(seed)
    tokens, cells, text_token, target, tile_image = [], [], [], [], []
    images: list[tuple[int, TokenLayout]] = []
    for part in parts:
        if isinstance(part, Text):
            count, cell = part.count, [NO_CELL] * part.count
            tokens += rng.integers(1, config.decoder.vocab_size, count).tolist()
            text_token += [part.text_token] * count
            target += [part.target] * count
        else:
            layout = part.layout(config)
            images.append((len(tokens), layout))
            offset = len(tile_image) * config.cells_per_tile
            cell = np.where(layout.cell >= 0, layout.cell + offset, layout.cell).tolist()
            tile_image += [max(tile_image, default=0) + 1] * layout.tiles
            tokens += [0] * len(cell)
            text_token += [False] * len(cell)
            target += [False] * len(cell)
        cells += cell
    size, fields = config.image.tile_size, config.batch_fields
    tiled = {
        f"tile_{name}": np.concatenate([np.zeros((0, 2), np.int32), *(getattr(one, name) for _, one in images)])
        for name in ("extent", "origin")
        if f"tile_{name}" in fields
    }
    return Example(
        id=f"example-{seed}",
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array(target, bool),
        text_token_mask=np.array(text_token, bool),
        vision_cell=np.array(cells, np.int32),
        tile_pixels=rng.integers(0, 256, (len(tile_image), size, size, 3), dtype=np.uint8),
        tile_image=np.array(tile_image, np.int32),
        cells_per_tile=config.cells_per_tile,
        positions=multi_axis_positions(images, len(tokens)) if "grid_positions" in fields else None,
        **tiled,
    )


def pack(
    config: VlmConfig,
    rows: Sequence[Sequence[Example]],
    *,
    tokens: int | None = None,
    tiles: int | None = None,
    pad_side: Literal["right", "left"] = "right",
) -> Batch:
    """Packs rows of samples into a batch, as small as they allow unless sizes are given."""
    shape = BatchShape(
        rows=len(rows),
        tokens=tokens or max(sum(len(e.tokens) for e in row) for row in rows),
        tiles=tiles or max(1, *(sum(len(e.tile_image) for e in row) for row in rows)),
        tile_size=config.image.tile_size,
    )
    return jax.tree.map(jnp.asarray, collate(rows, shape, pad_side, optional=config.batch_fields).batch)
