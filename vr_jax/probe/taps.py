"""Where the vision tokens are tapped, and the frozen forward pass that yields them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from PIL import Image

from vr_jax.data.collate import collate
from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation
from vr_jax.inference import user_turn
from vr_jax.model.batch import Batch, BatchShape
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.probe.errors import ProbeError

QUESTION = "Describe the image."
Kind = Literal["encoder", "compressor", "projector", "layer", "refusion"]
Window = Float[Array, "B cells patches Dv"]

# Projector -> what it compresses to before its own projection, and how. The first feature is its main input.
COMPRESSED: dict[str, tuple[str, Callable[[Any, Sequence[Window]], Float[Array, "B cells D"]]]] = {
    "pool": ("mean of each window's encoder features", lambda projector, features: jnp.mean(features[0], axis=-2)),
    "pixel_shuffle": (
        "each window's encoder features side by side",
        lambda projector, features: features[0].reshape(*features[0].shape[:2], -1),
    ),
    "ldpv2": (
        "mean of each window's features after the projector's MLP, before its convolution",
        lambda projector, features: jnp.mean(projector.mlp(features[0]), axis=-2),
    ),
    "perceiver": (
        "the latents after the last layer, before the MLP",
        lambda projector, features: projector.resample(_patches(features[0])),
    ),
}
NOT_COMPRESSED = {
    "mlp": "the projector 'mlp' does not compress: it would repeat the encoder",
    "token_packer": "the projector 'token_packer' compresses inside its attention",
    "resampler": "the projector 'resampler' compresses inside its attention",
    "c_abstractor": "the projector 'c_abstractor' compresses between its convolutions",
}


@dataclass(frozen=True)
class Tap:
    """layer: of the decoder, counted from 1; None before it."""

    name: str
    kind: Kind
    what: str
    layer: int | None = None


def default_layers(depth: int) -> tuple[int, ...]:
    """1, 4, 8, 12, ... and the last one."""
    return tuple(sorted({1, *range(4, depth + 1, 4), depth}))


def taps_of(config: VlmConfig, layers: Sequence[int]) -> tuple[tuple[Tap, ...], dict[str, str]]:
    """The taps of a model in the order of the forward pass, and what is left out and why.

    Raises ProbeError for layers that the decoder does not have."""
    depth = config.decoder.num_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
        raise ProbeError(f"layers {tuple(layers)}: expected increasing numbers in 1..{depth}, the decoder's layers")
    projector = config.projector.name
    left_out = {}
    taps = [Tap("encoder", "encoder", f"hidden state {config.vision_feature_layer} of the encoder, all patches")]
    if projector in COMPRESSED:
        taps.append(Tap("compressor", "compressor", COMPRESSED[projector][0]))
    else:
        reason = f"projector {projector!r} has no known compressed tokens before its projection"
        left_out["compressor"] = NOT_COMPRESSED.get(projector, reason)
    taps.append(Tap("projector", "projector", f"output of the projector {projector!r}"))
    stream = "residual stream at the vision tokens after decoder layer"
    refusion = config.refusion
    for layer in layers:
        acts = refusion is not None and layer in refusion.insert_after
        before = f", before {refusion.name} acts" if refusion and acts else ""
        taps.append(Tap(f"layer {layer}", "layer", f"{stream} {layer}, not final-normed{before}", layer))
        if refusion is not None and acts and layer < layers[-1]:
            what = f"{stream} {layer}, after {refusion.name} acted"
            taps.append(Tap(f"layer {layer} + {refusion.name}", "refusion", what, layer))
        elif refusion is not None and acts:
            left_out[f"layer {layer} + {refusion.name}"] = "behind the last chosen layer"
    return tuple(taps), left_out


def one_tile(config: VlmConfig) -> VlmConfig:
    """Every image squashed to one tile; a newline follows it if the model lays its images out with newlines."""
    image = single_tile(config.image.tile_size, unpad=config.image.unpad)
    return dataclasses.replace(config, image=image)


def prompt_batch(processor: Processor, question: str) -> Batch:
    """One row: the question about one image, whose pixels are to be replaced."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    conversation = Conversation("probe", (user_turn(question, 1),), (image.getvalue(),))
    example = processor.prompt(conversation)
    shape = BatchShape(rows=1, tokens=len(example.tokens), tiles=1, tile_size=processor.config.image.tile_size)
    return collate([[example]], shape).batch


def tapped_tokens(
    model: VisionLanguageModel, prompt: Batch, pixels: UInt8[Array, "B H W 3"], taps: Sequence[Tap]
) -> Mapping[str, Float[Array, "B T D"]]:
    """Tokens by tap; the model is frozen, so no gradient reaches it. Prefill only, on the prompt with each image.

    prompt: one row without padding (`prompt_batch`)."""
    model, config = jax.lax.stop_gradient(model), model.config
    rows = pixels.shape[0]
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), prompt)
    batch = batch.replace(tile_pixels=pixels[:, None])
    levels = model.encode_images(batch.tile_pixels)
    features = [levels[level][:, 0] for level in config.projector.feature_levels(config.spec)]
    encoder = levels[config.vision_feature_layer][:, 0]
    layers = sorted({tap.layer for tap in taps if tap.layer is not None})
    hidden = model.hidden_states(levels, batch, layers)
    found: dict[str, Array] = {}
    for tap in taps:
        match tap.kind:
            case "encoder":
                found[tap.name] = _patches(encoder)
            case "compressor":
                found[tap.name] = COMPRESSED[config.projector.name][1](model.projector, features)
            case "projector":
                found[tap.name] = model.projector(*features)
            case "layer":
                found[tap.name] = hidden.after[_layer(tap)]
            case "refusion":
                found[tap.name] = hidden.resumed[_layer(tap)]
    return jax.lax.stop_gradient(found)


def _patches(features: Window) -> Float[Array, "B P Dv"]:
    return features.reshape(features.shape[0], -1, features.shape[-1])


def _layer(tap: Tap) -> int:
    assert tap.layer is not None
    return tap.layer
