"""Translates the config.json of a whole LLaVA to `VlmConfig`; `config_writing` does the inverse.

A field that changes what the model computes, and that our model does not have, stops the import (`config_fields`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vr_jax.convert.config_fields import LLAVA_1_5_FIELDS, LLAVA_FIELDS, NEXT_FIELDS, ONEVISION_FIELDS
from vr_jax.convert.config_values import LARGEST, built, known, listed, section, with_defaults
from vr_jax.convert.decoder_configs import DECODERS, DecoderFamily, read_decoder
from vr_jax.convert.encoder_configs import ENCODERS, TOWERS, EncoderFamily, encoder_family, read_encoder
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import shown
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.registry import DecoderConfig, EncoderConfig
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

_SELECT = "vision_feature_select_strategy"
# What an absent field would stand for in these classes may not be supported, so that it is checked too.
_FIXED = (_SELECT, "projector_hidden_act", "multimodal_projector_bias")
_MOST_GRIDS = 10_000


@dataclass(frozen=True)
class LlavaClass:
    """A class of whole models of transformers.

    Attributes:
        name: Its name without the ending `ForConditionalGeneration`.
        model_type: Its `model_type`.
        fields: The fields of its config.json.
        encoder: The `model_type` of its encoder where `vision_config` does not say it.
        decoder: The `model_type` of its decoder where `text_config` does not say it.
    """

    name: str
    model_type: str
    fields: FieldTable
    encoder: str
    decoder: str

    @property
    def model_class(self) -> str:
        """The name of the class."""
        return f"{self.name}ForConditionalGeneration"


ONEVISION = LlavaClass("LlavaOnevision", "llava_onevision", ONEVISION_FIELDS, "siglip_vision_model", "qwen2")
NEXT = LlavaClass("LlavaNext", "llava_next", NEXT_FIELDS, "clip_vision_model", "llama")
LLAVA_1_5 = LlavaClass("Llava", "llava", LLAVA_1_5_FIELDS, "clip_vision_model", "llama")
LLAVA_CLASSES = (ONEVISION, NEXT, LLAVA_1_5)


def llava_class(values: Mapping[str, Any]) -> LlavaClass:
    """Returns the class that a config.json belongs to, by its `model_type`, or by its `architectures`."""
    kind, classes = values.get("model_type"), values.get("architectures") or ()
    for one in LLAVA_CLASSES:
        if kind == one.model_type or (kind is None and one.model_class in classes):
            return one
    raise AssertionError(f"{kind} and {classes} were recognised before")


def class_of(config: VlmConfig) -> LlavaClass | None:
    """Returns the class of transformers for the images of a model, or None if no class makes such tokens of them."""
    image = config.image
    if image.aspect_ratio in ("anyres", "anyres_max"):
        if not image.unpad:
            return None
        return NEXT if image.aspect_ratio == "anyres" else ONEVISION
    return LLAVA_1_5 if image.aspect_ratio in ("square", "pad", "crop") and not image.unpad else None


def text_family(values: Mapping[str, Any]) -> DecoderFamily:
    """Returns the family of the decoder in a config.json of transformers' classes of LLaVA, which was read before."""
    found = (values.get("text_config") or {}).get("model_type") or llava_class(values).decoder
    return next(family for family in DECODERS if family.model_type == found)


def read_hf_llava(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads the config of a LLaVA-OneVision, LLaVA-NeXT or LLaVA-1.5 of transformers.

    Args:
        values: The config.json.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    import transformers

    kind = llava_class(values)
    vision_values, text_values = section(values, "vision_config", file), section(values, "text_config", file)
    vision = _family(ENCODERS, vision_values, kind.encoder, f"{file}: vision_config")
    text = _family(DECODERS, text_values, kind.decoder, f"{file}: text_config")
    table = replace(kind.fields, fixed={**kind.fields.fixed, _SELECT: (vision.select,)})
    table.check(values, str(file))
    # The fields of the sections are checked as they stand in the file; the class adds its own to them.
    vision.fields.check(vision_values, f"{file}: vision_config")
    text.fields.check(text_values, f"{file}: text_config")
    names = (
        *("vision_config", "text_config", "vision_feature_layer", "image_grid_pinpoints", "tie_word_embeddings"),
        *("vision_aspect_ratio", "image_token_index", "image_token_id", *_FIXED),
    )
    known_names = [name for name in names if name in table.honoured or name in table.fixed]
    full = with_defaults(getattr(transformers, f"{kind.name}Config"), values, known_names, file)
    for name in _FIXED:
        value, fixed = getattr(full, name, None), table.fixed[name]
        if value is not None and value not in fixed:  # The file says nothing, since what it says was checked above.
            raise UserError(
                f"{file}: {name} is absent, and its class takes {value!r}, but only {fixed[0]!r} is supported; write "
                "it into the file if the model was trained so"
            )
    encoder = read_encoder(vision, known(full.vision_config.to_dict(), vision.fields), f"{file}: vision_config")
    decoder = known(full.text_config.to_dict(), text.fields)
    # The inner field ties the embeddings in transformers 4, the outer one in transformers 5.
    decoder["tie_word_embeddings"] = bool(decoder.get("tie_word_embeddings")) or full.tie_word_embeddings
    return built(
        VlmConfig,
        {
            "encoder": encoder,
            "decoder": read_decoder(text, decoder, f"{file}: text_config"),
            "projector": MlpConfig(),
            "image": _hf_image(kind, full, vision, encoder.image_size, file),
            "vision_feature_layer": _hidden_state(full.vision_feature_layer, encoder.num_layers, file),
            "image_token_id": full.image_token_id,
        },
        str(file),
    )


def _family[Family: (EncoderFamily, DecoderFamily)](
    families: Sequence[Family], values: Mapping[str, Any], default: str, where: str
) -> Family:
    """The family that a section of a config.json names by its model_type."""
    found = values.get("model_type", default)
    for family in families:
        if family.model_type == found:
            return family
    expected = ", ".join(repr(family.model_type) for family in families)
    raise UserError(f"{where}.model_type is {found!r}, expected one of {expected}")


def _hf_image(kind: LlavaClass, full: Any, vision: EncoderFamily, tile: int, file: PathLike) -> ImageConfig:
    """How a class of transformers makes tiles of an image, before its processor's file is read."""
    if kind is LLAVA_1_5:
        return ImageConfig(tile_size=tile, aspect_ratio=vision.one_tile, unpad=False, **vision.pixels)
    aspect = full.vision_aspect_ratio if kind is ONEVISION else "anyres"
    if kind is ONEVISION and not re.fullmatch(r"anyres_max_\d+", aspect):
        raise UserError(f"{file}: vision_aspect_ratio = {shown(aspect)} is not supported, expected 'anyres_max_N'")
    pinpoints = [(width, height) for height, width in _sizes(full.image_grid_pinpoints, file)]
    return _image_config(aspect, pinpoints, tile, vision.pixels | {"unpad": True, "unpad_rounding": "round7"}, file)


def read_llava(
    values: Mapping[str, Any],
    file: PathLike,
    *,
    own_layers: int,
    encoder: EncoderConfig | None,
    decoder: DecoderConfig | None,
    text: DecoderFamily,
) -> VlmConfig:
    """Reads a config.json of LLaVA's own layout (LlavaQwenForCausalLM, ...), also one that our export wrote.

    Args:
        values: The config.json.
        file: Its path, for messages.
        own_layers: Number of the encoder's layers in the checkpoint itself.
        encoder: The encoder's config where it is given separately.
        decoder: The decoder's config where it is given separately.
        text: The family of the decoder that the config.json describes.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    if "vr_jax" in values:
        try:
            return VlmConfig.from_dict(section(values, "vr_jax", file))
        except ConfigError as error:
            raise UserError(f"{file}: vr_jax: {error}") from None
    if encoder is None:
        encoder = _tower(values, file)
    vision = encoder_family(encoder)
    table = LLAVA_FIELDS[encoder.name].extended(text.fields)
    table.check(values, str(file))
    depth = encoder.num_layers
    if own_layers:
        encoder = replace(encoder, num_layers=own_layers)
    aspect = str(values.get("image_aspect_ratio") or "square")
    rest = {
        "unpad": values.get("mm_patch_merge_type") == "spatial_unpad",
        "unpad_rounding": "truncate",
        **vision.pixels,
    }
    if aspect == "square":
        aspect = vision.one_tile  # LLaVA leaves the image to the processor of the encoder
    pinpoints = _pinpoints(values.get("image_grid_pinpoints"), encoder.image_size, file)
    return built(
        VlmConfig,
        {
            "encoder": encoder,
            "decoder": decoder or read_decoder(text, values, file, table),
            "projector": MlpConfig(),
            "image": _image_config(aspect, pinpoints, encoder.image_size, rest, file),
            "vision_feature_layer": _llava_level(values, encoder, depth, file),
        },
        str(file),
    )


def _llava_level(values: Mapping[str, Any], encoder: EncoderConfig, depth: int, file: PathLike) -> int:
    """The hidden state that LLaVA's own code takes."""
    name = "mm_vision_select_layer"
    if name not in LLAVA_FIELDS[encoder.name].honoured:
        # LLaVA deletes SigLIP's last layer and takes the output of the others (LLaVA-NeXT:llava/model/
        # multimodal_encoder/siglip_encoder.py).
        return depth - 1
    if values.get(name) is None:
        raise UserError(f"{file}: {name} is absent; write the layer whose output the projector reads, usually -2")
    return _hidden_state(values[name], encoder.num_layers, file, name)


def _sizes(value: Any, file: PathLike) -> list[tuple[int, int]]:
    """The two numbers of each size in pixels."""
    sizes = [
        tuple(one) if isinstance(one, list | tuple) else (one,)
        for one in listed(value, f"{file}: image_grid_pinpoints")
    ]
    for size in sizes:
        if len(size) != 2 or any(not isinstance(one, int) or not 0 < one <= LARGEST for one in size):
            raise UserError(f"{file}: image_grid_pinpoints has {shown(list(size))}: expected two numbers of pixels")
    if len(sizes) > _MOST_GRIDS:
        raise UserError(f"{file}: image_grid_pinpoints has {len(sizes)} sizes: expected at most {_MOST_GRIDS}")
    return [(one, other) for one, other in sizes]


def _hidden_state(layer: Any, depth: int, file: PathLike, name: str = "vision_feature_layer") -> int:
    """The number of a hidden state, which negative numbers count from the last one."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"{file}: {name} = {layer!r} is not supported, expected one layer")
    return layer if layer >= 0 else depth + 1 + layer


def _tower(values: Mapping[str, Any], file: PathLike) -> EncoderConfig:
    name = str(values.get("mm_vision_tower", values.get("vision_tower")))
    short = {known_name.rsplit("/", 1)[-1]: known_name for known_name in TOWERS}
    found = short.get(name.rstrip("/").rsplit("/", 1)[-1])
    if found is None:
        raise UserError(
            f"{file}: mm_vision_tower {name!r} is unknown, give its directory with --encoder; known: {', '.join(short)}"
        )
    return TOWERS[found]


def _pinpoints(value: Any, tile: int, file: PathLike) -> list[tuple[int, int]]:
    """The sizes (width, height) in pixels that LLaVA gives as a list, as its text, or as "(1x1),...,(6x6)"."""
    if value is None:
        return []
    if isinstance(value, str):
        corners = re.findall(r"\((\d{1,4})x(\d{1,4})\)", value)
        if corners:
            (left, top), (right, bottom) = ((int(a), int(b)) for a, b in (corners[0], corners[-1]))
            if (right - left + 1) * (bottom - top + 1) > _MOST_GRIDS:
                raise UserError(f"{file}: image_grid_pinpoints {shown(value)}: expected at most {_MOST_GRIDS} sizes")
            return [(i * tile, j * tile) for i in range(left, right + 1) for j in range(top, bottom + 1)]
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"{file}: image_grid_pinpoints {shown(value)} is not a list of sizes") from None
    return _sizes(value, file)


def _image_config(
    aspect: str, pinpoints: Sequence[tuple[int, int]], tile: int, rest: Mapping[str, Any], file: PathLike
) -> ImageConfig:
    limit = re.fullmatch(r"anyres_max_(\d{1,6})", aspect)
    if limit is None and aspect not in ("square", "pad", "crop", "anyres"):
        raise UserError(f"{file}: image aspect ratio {aspect!r}: expected square, pad, anyres or anyres_max_N")
    odd = [size for size in pinpoints if size[0] % tile or size[1] % tile]
    if odd:
        raise UserError(f"{file}: image_grid_pinpoints {odd} are no multiples of the tile size {tile}")
    anyres = aspect.startswith("anyres")
    return built(
        ImageConfig,
        {
            "tile_size": tile,
            "aspect_ratio": "anyres_max" if limit else aspect,
            "grids": tuple((width // tile, height // tile) for width, height in pinpoints) if anyres else (),
            "max_tiles": int(limit[1]) if limit else 9,
            **rest,
        },
        str(file),
    )
