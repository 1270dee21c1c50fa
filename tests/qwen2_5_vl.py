"""Weights and inputs of transformers' Qwen2.5-VL in our form, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests import torch_weights
from tests.model.families import WindowsImage
from tests.tiny import pack
from vr_jax.convert.method_tables import PROJECTORS
from vr_jax.convert.tables import (
    HEAD,
    TEXT,
    TRANSPOSE,
    VISION_REMEMBER,
    Rule,
    Table,
    Transform,
    linear,
    norm,
)
from vr_jax.data.layouts import TokenLayout
from vr_jax.data.positions import multi_axis_positions
from vr_jax.data.types import Example
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.projectors.merger import MergerConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model


def _add_frames(kernel: np.ndarray) -> np.ndarray:
    """The kernel (D, 3, 2, p, p) of two equal frames as a matrix for pixels (row, column, channel)."""
    return kernel.sum(2).transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _split_frames(kernel: np.ndarray) -> np.ndarray:
    """Half of the kernel for each of two frames."""
    side = round((kernel.shape[0] / 3) ** 0.5)
    frame = kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1) / 2
    return np.stack([frame, frame], axis=2)


# The names below `model.visual.`.
VISUAL: Table = (
    Rule("patch_embed.proj.weight", ("encoder.patch_embed.kernel",), Transform(_add_frames, _split_frames)),
    *norm("blocks.{n}.norm1", "encoder.layers.norm1", bias=False),
    *norm("blocks.{n}.norm2", "encoder.layers.norm2", bias=False),
    Rule("blocks.{n}.attn.qkv.weight", tuple(f"encoder.layers.attn.{x}.kernel" for x in "qkv"), TRANSPOSE),
    Rule("blocks.{n}.attn.qkv.bias", tuple(f"encoder.layers.attn.{x}.bias" for x in "qkv")),
    *linear("blocks.{n}.attn.proj", "encoder.layers.attn.out"),
    *linear("blocks.{n}.mlp.gate_proj", "encoder.layers.mlp.gate"),
    *linear("blocks.{n}.mlp.up_proj", "encoder.layers.mlp.up"),
    *linear("blocks.{n}.mlp.down_proj", "encoder.layers.mlp.down"),
)
MERGER = PROJECTORS["merger"]


def model_config(vision: dict[str, Any], text: dict[str, Any], *, tied: bool, **changes: Any) -> VlmConfig:
    """The model that the two parts of a `Qwen2_5_VLConfig` describe."""
    patch, stride = vision["patch_size"], vision["spatial_merge_size"]
    # transformers rounds a window down to whole cells.
    window = vision["window_size"] // stride // patch * stride * patch
    return VlmConfig(
        encoder=Qwen25VisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["depth"],
            num_heads=vision["num_heads"],
            image_size=window,
            patch_size=patch,
            full_attention_layers=tuple(vision["fullatt_block_indexes"]),
        ),
        decoder=TransformerConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            rope_theta=text["rope_theta"],
            rope_sections=tuple(text["mrope_section"]),
            rms_norm_eps=text["rms_norm_eps"],
            tie_word_embeddings=tied,
        ),
        projector=MergerConfig(stride=stride),
        image=ImageConfig(tile_size=window, aspect_ratio="native", unpad=False),
        vision_feature_layer=vision["depth"],
        **{"refusion": None} | changes,
    )


def load_model(config: VlmConfig, weights: torch_weights.Weights) -> VisionLanguageModel:
    """The model with transformers' weights, and with Vision Remember's under `vr.`; all of them are used."""
    groups = {
        prefix: torch_weights.under(weights, prefix)
        for prefix in ("model.visual.merger.", "model.visual.", "model.language_model.", "vr.")
    }
    visual = {name: x for name, x in groups["model.visual."].items() if not name.startswith("merger.")}
    text = groups["model.language_model."] | {n: x for n, x in weights.items() if n.startswith("lm_head.")}
    assert len(weights) == len(visual) + len(text) + len(groups["model.visual.merger."]) + len(groups["vr."])
    model = abstract_model(config)
    model.encoder = torch_weights.load(model.encoder, VISUAL, visual, "encoder.")
    model.projector = torch_weights.load(model.projector, MERGER, groups["model.visual.merger."], "projector.")
    model.decoder = torch_weights.load(model.decoder, TEXT + HEAD, text, "decoder.")
    model.image_newline = jnp.zeros(config.decoder.hidden_size)  # No token of the family is a newline.
    if model.refusion is not None:
        model.refusion = torch_weights.load(model.refusion, VISION_REMEMBER, groups["vr."], "refusion.")
    return model


@dataclass(frozen=True)
class Inputs:
    """What transformers' model is given, in our form.

    Attributes:
        batch: The rows. Their pixels are zeros.
        patches: The values of the patches of each tile, in window-major order.
        layouts: The images of each row.
        merged: For each vision token in transformers' order, its row, and its cell in the row.
    """

    batch: Batch
    patches: np.ndarray
    layouts: list[list[TokenLayout]]
    merged: tuple[np.ndarray, np.ndarray]


def inputs_of(
    config: VlmConfig,
    ids: np.ndarray,
    mask: np.ndarray,
    pixel_values: np.ndarray,
    grids: Sequence[Sequence[int]],
    *,
    image_token: int,
    text_select: np.ndarray | None = None,
) -> Inputs:
    """Converts the inputs of transformers' model.

    Args:
        config: The model.
        ids: Token ids (B, L).
        mask: True at real tokens (B, L), which are aligned to the right.
        pixel_values: The processor's patches, one row for each, as (channel, frame, row, column).
        grids: The frames, rows and columns of patches of each image, in the order of the images in the batch.
        image_token: The id of vision tokens.
        text_select: The tokens that the text-guided token pools (B, L).
    """
    patch, stride, cells = config.encoder.patch_size, config.projector.stride, config.cells_per_tile
    values = np.asarray(pixel_values, np.float32).reshape(-1, 3, 2, patch, patch)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])  # A still image is two equal frames.
    values = values[:, :, 0].transpose(0, 2, 3, 1).reshape(-1, stride**2, 3 * patch**2)
    images = [WindowsImage(rows, columns).layout(config) for _, rows, columns in grids]
    examples, layouts, tiles, merged = [], [], [], []
    for row in range(len(ids)):
        tokens = ids[row][mask[row]].astype(np.int32)
        vision = np.flatnonzero(tokens == image_token)
        cell = np.full(len(tokens), NO_CELL, np.int32)
        placed: list[tuple[int, TokenLayout]] = []
        found: list[np.ndarray] = []
        while len(vision):
            layout = images.pop(0)
            count = len(layout.cell)
            here, vision = vision[:count], vision[count:]
            assert here[-1] - here[0] == count - 1
            base = sum(len(x) for x in found)
            cell[here] = layout.cell + base
            window = np.zeros((layout.tiles * cells, *values.shape[1:]), np.float32)
            window[layout.cell], values = values[:count], values[count:]
            found.append(window)
            placed.append((int(here[0]), layout))
            merged.append((np.full(count, row), layout.cell + base))
        number = [one.tiles for _, one in placed]
        side = config.image.tile_size
        examples.append(
            Example(
                id=str(row),
                tokens=tokens,
                loss_mask=np.zeros(len(tokens), bool),
                text_token_mask=np.zeros(len(tokens), bool) if text_select is None else text_select[row][mask[row]],
                vision_cell=cell,
                tile_pixels=np.zeros((sum(number), side, side, 3), np.uint8),
                tile_image=np.repeat(np.arange(1, len(number) + 1, dtype=np.int32), number),
                cells_per_tile=cells,
                positions=multi_axis_positions(placed, len(tokens)),
                tile_extent=np.concatenate([np.zeros((0, 2), np.int32), *(one.extent for _, one in placed)]),
                tile_origin=np.concatenate([np.zeros((0, 2), np.int32), *(one.origin for _, one in placed)]),
            )
        )
        layouts.append([one for _, one in placed])
        tiles.append(np.concatenate([np.zeros((0, *values.shape[1:]), np.float32), *found]))
    assert not images
    assert not len(values)
    batch = pack(config, [[one] for one in examples], tokens=ids.shape[1], pad_side="left")
    slots = batch.tile_image.shape[1]
    patches = np.zeros((len(ids), slots, cells, *values.shape[1:]), np.float32)
    for row, one in enumerate(tiles):
        patches[row].reshape(-1, *values.shape[1:])[: len(one)] = one
    where = [np.concatenate([np.zeros(0, np.int32), *(x[i] for x in merged)]) for i in range(2)]
    return Inputs(batch, patches, layouts, (where[0], where[1]))
