"""Tiny MiniCPM-V models, their batches, and the names of the official weights, for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tests import torch_weights
from tests.tiny import tiny_decoder, tiny_refusion
from vr_jax.convert.method_tables import PROJECTORS
from vr_jax.convert.tables import HEAD, PATCH, TEXT, TRANSPOSE, VISION_REMEMBER, Rule, Table, linear, norm, prefixed
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs, KVCache
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig
from vr_jax.model.projectors.resampler import ResamplerConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.model.windows import largest_window, window_capacity

PATCH_SIZE = 14

# The names of timm's vision transformer.
VISION: Table = (
    Rule("patch_embed.proj.weight", ("encoder.patch_embed.kernel",), PATCH),
    Rule("patch_embed.proj.bias", ("encoder.patch_embed.bias",)),
    Rule("pos_embed", ("encoder.position_embedding",)),
    *norm("blocks.{n}.norm1", "encoder.layers.norm1"),
    *norm("blocks.{n}.norm2", "encoder.layers.norm2"),
    Rule("blocks.{n}.attn.qkv.weight", tuple(f"encoder.layers.attn.{x}.kernel" for x in "qkv"), TRANSPOSE),
    Rule("blocks.{n}.attn.qkv.bias", tuple(f"encoder.layers.attn.{x}.bias" for x in "qkv")),
    *linear("blocks.{n}.attn.proj", "encoder.layers.attn.out"),
    *linear("blocks.{n}.mlp.fc1", "encoder.layers.mlp.fc1"),
    *linear("blocks.{n}.mlp.fc2", "encoder.layers.mlp.fc2"),
    *norm("norm", "encoder.post_norm"),
)
TABLE: Table = (
    *prefixed("vpm.", VISION),
    *prefixed("resampler.", PROJECTORS["resampler"]),
    *prefixed("llm.model.", TEXT),
    *prefixed("llm.", HEAD),
    *prefixed("vr.", VISION_REMEMBER),
)


def slot_side(grids: Sequence[Sequence[int]], side: int) -> int:
    """The side of a slot, in patches, that holds slices of the given grids and their windows."""
    found = 1
    while any(
        rows * columns > found**2 or largest_window(rows, columns, side) > window_capacity(found**2, side)
        for rows, columns in grids
    ):
        found += 1
    return found


def decoder_config(c: Mapping[str, Any]) -> TransformerConfig:
    """The decoder of a `config.json`."""
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        attention_bias=False,
        rope_theta=c.get("rope_theta") or 10000.0,
        rms_norm_eps=c["rms_norm_eps"],
        embedding_scale=c["scale_emb"],
        residual_scale=c["scale_depth"] / c["num_hidden_layers"] ** 0.5,
        logit_scale=c["dim_model_base"] / c["hidden_size"],
        tie_word_embeddings=c["tie_word_embeddings"],
    )


def model_config(
    vision: Mapping[str, Any],
    decoder: TransformerConfig,
    *,
    blocks: int,
    queries: int,
    heads: int | None,
    slot: int,
    refusion: VisionRememberConfig | None = None,
) -> VlmConfig:
    """A model.

    Args:
        vision: Arguments of timm's vision transformer.
        decoder: The decoder.
        blocks: The blocks of the vision transformer that are kept.
        queries: The queries per side of the resampler.
        heads: The heads of the resampler.
        slot: The side of a slot, in patches.
        refusion: The re-fusion blocks.
    """
    assert vision["patch_size"] == PATCH_SIZE
    return VlmConfig(
        encoder=SiglipSlicesConfig(
            hidden_size=vision["embed_dim"],
            intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]),
            num_layers=blocks,
            num_heads=vision["num_heads"],
            image_size=slot * PATCH_SIZE,
            position_grid=vision["img_size"] // PATCH_SIZE,
        ),
        decoder=decoder,
        projector=ResamplerConfig(queries=queries, heads=heads),
        refusion=refusion,
        image=ImageConfig(
            tile_size=slot * PATCH_SIZE, aspect_ratio="slices", unpad=False, slice_size=(slot - 1) * PATCH_SIZE
        ),
        vision_feature_layer=blocks + 1,
    )


def tiny_config(slot: int = 8, **changes: Any) -> VlmConfig:
    """A model with slots of slot x slot patches of 14 pixels, 3 x 3 queries, and Vision Remember.

    Args:
        slot: The side of a slot.
        **changes: Fields with other values.
    """
    vision = {"img_size": 70, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 1.5, "patch_size": PATCH_SIZE}
    decoder = tiny_decoder(
        tie_word_embeddings=False, attention_bias=False, embedding_scale=12.0, residual_scale=0.7, logit_scale=0.5
    )
    refusion = tiny_refusion(levels=(1, 3, 4))
    config = model_config(vision, decoder, blocks=4, queries=3, heads=2, slot=slot, refusion=refusion)
    return dataclasses.replace(config, **changes)


def load(config: VlmConfig, weights: Mapping[str, np.ndarray]) -> VisionLanguageModel:
    """A model with official weights; all are used."""
    own = {name: value for name, value in weights.items() if name != "resampler.pos_embed"}
    own["vpm.pos_embed"] = own["vpm.pos_embed"][0]
    # The model has a vector for ends of rows, which MiniCPM-V does not.
    own["newline"] = np.zeros(config.decoder.hidden_size, np.float32)
    return torch_weights.load(abstract_model(config), (*TABLE, Rule("newline", ("image_newline",))), own, "")


def canvas(piece: np.ndarray, slot: int) -> np.ndarray:
    """A slot that holds the patches of a slice (H, W, 3) row by row."""
    rows, columns = (size // PATCH_SIZE for size in piece.shape[:2])
    patches = piece.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, 3).swapaxes(1, 2)
    filled = np.full((slot * slot, PATCH_SIZE, PATCH_SIZE, 3), 77, np.uint8)  # what lies beyond must not matter
    filled[: rows * columns] = patches.reshape(-1, PATCH_SIZE, PATCH_SIZE, 3)
    return filled.reshape(slot, slot, PATCH_SIZE, PATCH_SIZE, 3).swapaxes(1, 2).reshape(slot * PATCH_SIZE, -1, 3)


def batch(
    config: VlmConfig,
    slices: Sequence[Sequence[np.ndarray]],
    images: Sequence[Sequence[int]],
    tokens: np.ndarray,
    vision_cell: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    text_select: np.ndarray | None = None,
) -> Batch:
    """A batch of one sample per row.

    Args:
        config: The model.
        slices: The slices of each row.
        images: The image of each slice, counted from 1 in each row.
        tokens: Token ids (B, N).
        vision_cell: The cell of each vision token, see `Batch`.
        mask: The valid tokens, or None if all are.
        positions: The positions of the tokens, 0, 1, ... by default.
        text_select: The tokens that the text-guided token pools, none by default.
    """
    rows, length = tokens.shape
    slots, side = max(1, *(len(row) for row in slices)), config.encoder.grid
    pixels = np.zeros((rows, slots, side * PATCH_SIZE, side * PATCH_SIZE, 3), np.uint8)
    extent, image = np.zeros((rows, slots, 2), np.int32), np.zeros((rows, slots), np.int32)
    for b, row in enumerate(slices):
        for t, piece in enumerate(row):
            pixels[b, t] = canvas(piece, side)
            extent[b, t] = np.array(piece.shape[:2]) // PATCH_SIZE
            image[b, t] = images[b][t]
    segments = np.ones((rows, length), np.int32) if mask is None else mask.astype(np.int32)
    return Batch(
        tokens=tokens.astype(np.int32),
        positions=np.broadcast_to(np.arange(length), tokens.shape).astype(np.int32)
        if positions is None
        else positions.astype(np.int32),
        segment_ids=segments,
        loss_mask=np.zeros(tokens.shape, bool),
        text_token_mask=np.zeros(tokens.shape, bool) if text_select is None else text_select,
        vision_cell=np.where(segments > 0, vision_cell, NO_CELL).astype(np.int32),
        tile_pixels=pixels,
        tile_segment=(image > 0).astype(np.int32),
        tile_image=image,
        tile_extent=extent,
    )


class Greedy(NamedTuple):
    """The result of `greedy`.

    Attributes:
        logits: The logits of the prompt (B, N, V).
        tokens: The chosen tokens (B, steps).
        decoded: The logits after each of them (B, steps, V).
    """

    logits: np.ndarray
    tokens: np.ndarray
    decoded: np.ndarray


@jax.jit
def _prefill(model: VisionLanguageModel, inputs: DecoderInputs, levels: Any, batch: Batch | None, cache: KVCache):
    hook = None if batch is None else model.stage_hook(levels, batch)
    hidden, cache = model.decoder(inputs, cache, hook)
    return model.logits(hidden), cache


_decode = jax.jit(lambda model, *arguments: model.decode(*arguments))


def greedy(
    model: VisionLanguageModel, inputs: DecoderInputs, steps: int, batch: Batch | None = None, levels: Any = None
) -> Greedy:
    """Fills the caches with the prompts, whose padding may be on either side, and decodes greedily."""
    rows, length = inputs.positions.shape
    logits, cache = _prefill(model, inputs, levels, batch, model.init_cache(rows, length + steps))
    last = [np.flatnonzero(row)[-1] for row in np.asarray(inputs.segment_ids)]
    position = np.array([inputs.positions[b, i] for b, i in enumerate(last)], np.int32)[:, None]
    token = np.array([np.argmax(logits[b, i]) for b, i in enumerate(last)], np.int32)[:, None]
    tokens, decoded = [], []
    for _ in range(steps):
        position = position + 1
        hidden, cache = _decode(model, token, position, cache)
        tokens.append(token[:, 0])
        decoded.append(np.asarray(model.logits(hidden))[:, 0])
        token = np.argmax(decoded[-1], axis=-1).astype(np.int32)[:, None]
    return Greedy(np.asarray(logits), np.stack(tokens, axis=1), np.stack(decoded, axis=1))
