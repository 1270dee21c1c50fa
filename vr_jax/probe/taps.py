"""The taps of the probe: the places of the model whose vision tokens are classified, and the frozen forward pass."""

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
from vr_jax.errors import UserError
from vr_jax.inference import user_turn
from vr_jax.model.batch import Batch, BatchShape
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.vlm import VisionLanguageModel

QUESTION = "Describe the image."
Kind = Literal["encoder", "compressor", "projector", "layer", "refusion"]
Window = Float[Array, "B cells patches Dv"]

# For each projector: a description of the tokens that it compresses to before its own projection, and how they are
# computed. The first feature level of a projector is its main input.
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
# For other projectors: the reason why there are no compressed tokens to tap.
NOT_COMPRESSED = {
    "mlp": "the projector 'mlp' does not compress, so this tap would repeat the encoder",
    "token_packer": "the projector 'token_packer' compresses inside its attention",
    "resampler": "the projector 'resampler' compresses inside its attention",
    "c_abstractor": "the projector 'c_abstractor' compresses between its convolutions",
}


@dataclass(frozen=True)
class Tap:
    """A place in the model.

    Attributes:
        name: The name in results and tables.
        kind: The part of the model.
        description: A phrase that states which tokens are tapped.
        layer: The decoder layer, counted from 1, or None before the decoder.
    """

    name: str
    kind: Kind
    description: str
    layer: int | None = None


def default_layers(depth: int) -> tuple[int, ...]:
    """Returns the layers 1, 4, 8, 12, ... and the last one of a decoder with `depth` layers."""
    return tuple(sorted({1, *range(4, depth + 1, 4), depth}))


def taps_of(config: VlmConfig, layers: Sequence[int]) -> tuple[tuple[Tap, ...], dict[str, str]]:
    """Lists the taps of a model.

    Args:
        config: The model.
        layers: The decoder layers to tap, counted from 1.

    Returns:
        The taps in the order of the forward pass, and the taps that are left out, each with the reason.

    Raises:
        UserError: The decoder does not have these layers.
    """
    depth = config.decoder.num_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
        raise UserError(
            f"config.probe.layers = {tuple(layers)}: expected increasing numbers from 1 to {depth}, the number of "
            "decoder layers"
        )
    projector = config.projector.name
    left_out = {}
    taps = [Tap("encoder", "encoder", f"hidden state {config.vision_feature_layer} of the encoder, all patches")]
    if projector in COMPRESSED:
        taps.append(Tap("compressor", "compressor", COMPRESSED[projector][0]))
    else:
        reason = f"the compressed tokens of the projector {projector!r} are not known"
        left_out["compressor"] = NOT_COMPRESSED.get(projector, reason)
    taps.append(Tap("projector", "projector", f"output of the projector {projector!r}"))
    stream = "residual stream at the vision tokens after decoder layer"
    refusion = config.refusion
    for layer in layers:
        acts = refusion is not None and layer in refusion.insert_after
        before = f", before {refusion.name} acts" if refusion and acts else ""
        taps.append(Tap(f"layer {layer}", "layer", f"{stream} {layer}, without final norm{before}", layer))
        if refusion is not None and acts and layer < layers[-1]:
            description = f"{stream} {layer}, after {refusion.name} acted"
            taps.append(Tap(f"layer {layer} + {refusion.name}", "refusion", description, layer))
        elif refusion is not None and acts:
            left_out[f"layer {layer} + {refusion.name}"] = "it acts after the last chosen layer"
    return tuple(taps), left_out


def one_tile(config: VlmConfig) -> VlmConfig:
    """Returns the config with one tile per image, onto which the image is squashed.

    A newline token follows the image if the model lays out its images with newlines.

    Raises:
        UserError: The encoder reads no square tiles.
    """
    if config.encoder.layout != "square":
        raise UserError(
            f"the probe squashes an image to one square tile, which the encoder {config.encoder.name!r} does not read; "
            "it can be asked about models with square tiles only"
        )
    image = single_tile(config.image.tile_size, unpad=config.image.unpad)
    return dataclasses.replace(config, image=image)


def prompt_batch(processor: Processor, question: str) -> Batch:
    """Prepares a batch of one row: a question about one image, whose pixels `tapped_tokens` replaces."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    turn = user_turn(question, 1, processor.encoder.separators)
    conversation = Conversation("probe", (turn,), (image.getvalue(),))
    example = processor.prompt(conversation)
    shape = BatchShape(rows=1, tokens=len(example.tokens), tiles=1, tile_size=processor.config.image.tile_size)
    return collate([[example]], shape).batch


def tapped_tokens(
    model: VisionLanguageModel, prompt: Batch, pixels: UInt8[Array, "B H W 3"], taps: Sequence[Tap]
) -> Mapping[str, Float[Array, "B T D"]]:
    """Runs the prompt with each image through the frozen model. No gradient reaches the model.

    Args:
        model: The model.
        prompt: One row without padding, as `prompt_batch` returns it.
        pixels: The images, one tile each.
        taps: The taps of the model.

    Returns:
        The tokens by the name of the tap.
    """
    model, config = jax.lax.stop_gradient(model), model.config
    rows = pixels.shape[0]
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), prompt)
    batch = batch.replace(tile_pixels=pixels[:, None])
    levels = model.encode_images(batch)
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
    """Joins the windows of an image to one sequence of patches."""
    return features.reshape(features.shape[0], -1, features.shape[-1])


def _layer(tap: Tap) -> int:
    assert tap.layer is not None
    return tap.layer
