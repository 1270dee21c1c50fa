"""Translates config.json of the foreign formats to `VlmConfig`; `config_writing` does the inverse.

A field that changes what the model computes, and that our model does not have, stops the import (`config_fields`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vr_jax.convert.config_fields import (
    LLAVA_FIELDS,
    NEXT_FIELDS,
    ONEVISION_FIELDS,
    QWEN2_FIELDS,
    SIGLIP_FIELDS,
    SIGLIP_WHOLE_FIELDS,
)
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import Config, shown
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

# The fields of transformers' configs, by our names.
SIGLIP_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "layer_norm_eps",
}
QWEN2_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# What an absent field would stand for in these classes is not supported, so that it is checked too.
_HF_LLAVA_FIXED = ("vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias")
_MOST_LAYERS, _LARGEST = 10_000, 2**20  # a damaged number shall not fill the memory
_MOST_GRIDS = 10_000
# LLaVA's config.json names its encoder and does not describe it.
TOWERS = {
    **{
        f"siglip-base-patch16-{size}": SiglipConfig(
            hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, image_size=size
        )
        for size in (224, 256, 384, 512)
    },
    **{f"siglip-large-patch16-{size}": SiglipConfig(image_size=size) for size in (256, 384)},
    **{
        f"siglip-so400m-patch14-{size}": SiglipConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_layers=27,
            num_heads=16,
            image_size=size,
            patch_size=14,
        )
        for size in (224, 384)
    },
}


def read_siglip(values: Mapping[str, Any], file: PathLike) -> SiglipConfig:
    """Reads the config of an encoder.

    Args:
        values: A config.json of SiglipModel or SiglipVisionModel, or the `vision_config` of a LLaVA.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our encoder does not support it.
    """
    from transformers import SiglipVisionConfig

    where = str(file)
    if "vision_config" in values:
        SIGLIP_WHOLE_FIELDS.check(values, where)
        values, where = _section(values, "vision_config", file), f"{file}: vision_config"
    SIGLIP_FIELDS.check(values, where)
    full = _with_defaults(SiglipVisionConfig, values, SIGLIP_NAMES.values(), where)
    found = {ours: getattr(full, theirs) for ours, theirs in SIGLIP_NAMES.items()}
    for name in ("image_size", "patch_size"):
        if isinstance(found[name], list | tuple):
            if len(set(found[name])) != 1:
                raise UserError(f"{where}: {name} = {shown(found[name])} is not supported, expected a square")
            found[name] = found[name][0]
    return _built(SiglipConfig, found, where)


def read_qwen2(values: Mapping[str, Any], file: PathLike, table: FieldTable | None = None) -> TransformerConfig:
    """Reads the config of a decoder.

    Args:
        values: A config.json of Qwen2ForCausalLM or of LLaVA's own layout, or the `text_config` of a LLaVA.
        file: Its path, for messages.
        table: The fields that it may have; by default those of Qwen2.

    Raises:
        UserError: The config is not valid, or our decoder does not support it.
    """
    from transformers import Qwen2Config as HfQwen2Config

    where = str(file)
    (table or QWEN2_FIELDS).check(values, where)
    names = (*QWEN2_NAMES.values(), "rope_theta", "rope_scaling", "rope_parameters")
    full = _with_defaults(HfQwen2Config, values, names, where)
    rope = full.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{file}: rope type {rope['rope_type']!r} is not supported, expected 'default'")
    for name, value in rope.items():
        if name not in ("rope_type", "type", "rope_theta") and (name, value) != ("partial_rotary_factor", 1.0):
            raise UserError(f"{file}: rope_parameters has {name} = {shown(value)}, which is not supported; remove it")
    kinds = _listed(values.get("layer_types"), f"{file}: layer_types")
    if kinds and len(kinds) != full.num_hidden_layers:
        raise UserError(
            f"{file}: layer_types names {len(kinds)} layers, expected as many as num_hidden_layers = "
            f"{full.num_hidden_layers}"
        )
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise UserError(f"{file}: layer_types has {other[0]!r}, which is not supported, expected 'full_attention'")
    found = {ours: getattr(full, theirs) for ours, theirs in QWEN2_NAMES.items()}
    config = _built(TransformerConfig, found | {"rope_theta": rope.get("rope_theta")}, where)
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{file}: head_dim = {values['head_dim']}, expected hidden_size / heads = {config.head_dim}")
    return config


def read_hf_llava(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads the config of a LLaVA-OneVision or LLaVA-NeXT of transformers that consists of SigLIP and Qwen2.

    Args:
        values: The config.json.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    from transformers import LlavaNextConfig, LlavaOnevisionConfig

    kind = values.get("model_type") or str(values.get("architectures"))
    onevision = kind == "llava_onevision" or "LlavaOnevisionForConditionalGeneration" in kind
    for section, expected in (("vision_config", "siglip_vision_model"), ("text_config", "qwen2")):
        default = expected if onevision else "absent"
        found = _section(values, section, file).get("model_type", default)
        if found != expected:
            raise UserError(f"{file}: {section}.model_type is {found!r}, expected {expected!r}")
    config_class, table = (LlavaOnevisionConfig, ONEVISION_FIELDS) if onevision else (LlavaNextConfig, NEXT_FIELDS)
    table.check(values, str(file))
    # The fields of the sections are checked as they stand in the file; the class adds its own to them.
    SIGLIP_FIELDS.check(_section(values, "vision_config", file), f"{file}: vision_config")
    QWEN2_FIELDS.check(_section(values, "text_config", file), f"{file}: text_config")
    names = (
        *("vision_config", "text_config", "vision_feature_layer", "image_grid_pinpoints", "tie_word_embeddings"),
        *("vision_aspect_ratio", "image_token_index", "image_token_id", *_HF_LLAVA_FIXED),
    )
    full = _with_defaults(config_class, values, names, file)
    for name in _HF_LLAVA_FIXED:
        value, fixed = getattr(full, name, None), table.fixed[name]
        if value is not None and value not in fixed:  # The file says nothing, since what it says was checked above.
            raise UserError(
                f"{file}: {name} is absent, and its class takes {value!r}, but only {fixed[0]!r} is supported; write "
                "it into the file if the model was trained so"
            )
    vision = read_siglip(_known(full.vision_config.to_dict(), SIGLIP_FIELDS), f"{file}: vision_config")
    text = _known(full.text_config.to_dict(), QWEN2_FIELDS)
    # The inner field ties the embeddings in transformers 4, the outer one in transformers 5.
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings")) or full.tie_word_embeddings
    aspect = full.vision_aspect_ratio if onevision else "anyres"
    if onevision and not re.fullmatch(r"anyres_max_\d+", aspect):
        raise UserError(f"{file}: vision_aspect_ratio = {shown(aspect)} is not supported, expected 'anyres_max_N'")
    pinpoints = [(width, height) for height, width in _sizes(full.image_grid_pinpoints, file)]
    image = _image_config(aspect, pinpoints, vision.image_size, unpad=True, rounding="round7", file=file)
    return _built(
        VlmConfig,
        {
            "encoder": vision,
            "decoder": read_qwen2(text, f"{file}: text_config"),
            "projector": MlpConfig(),
            "image": image,
            "vision_feature_layer": _hidden_state(full.vision_feature_layer, vision.num_layers, file),
            "image_token_id": full.image_token_id,
        },
        str(file),
    )


def read_llava(
    values: Mapping[str, Any],
    file: PathLike,
    *,
    own_layers: int,
    encoder: SiglipConfig | None,
    decoder: TransformerConfig | None,
) -> VlmConfig:
    """Reads a config.json of LLaVA's own layout (LlavaQwenForCausalLM), also one that our export wrote.

    Args:
        values: The config.json.
        file: Its path, for messages.
        own_layers: Number of the encoder's layers in the checkpoint itself.
        encoder: The encoder's config where it is given separately.
        decoder: The decoder's config where it is given separately.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    if "vr_jax" in values:
        try:
            return VlmConfig.from_dict(_section(values, "vr_jax", file))
        except ConfigError as error:
            raise UserError(f"{file}: vr_jax: {error}") from None
    LLAVA_FIELDS.check(values, str(file))
    if encoder is None:
        encoder = _tower(values, file)
    depth = encoder.num_layers
    if own_layers:
        encoder = replace(encoder, num_layers=own_layers)
    aspect = str(values.get("image_aspect_ratio") or "square")
    unpad = values.get("mm_patch_merge_type") == "spatial_unpad"
    pinpoints = _pinpoints(values.get("image_grid_pinpoints"), encoder.image_size, file)
    return _built(
        VlmConfig,
        {
            "encoder": encoder,
            "decoder": decoder or read_qwen2(values, file, LLAVA_FIELDS),
            "projector": MlpConfig(),
            "image": _image_config(aspect, pinpoints, encoder.image_size, unpad=unpad, rounding="truncate", file=file),
            # LLaVA deletes the encoder's last layer and takes the output of the others (LLaVA-NeXT:llava/model/
            # multimodal_encoder/siglip_encoder.py).
            "vision_feature_layer": depth - 1,
        },
        str(file),
    )


def _with_defaults(config_class: Any, values: Mapping[str, Any], names: Any, file: PathLike) -> Any:
    """A config object of transformers, which fills in the fields that a config.json leaves out."""
    from huggingface_hub.errors import StrictDataclassError

    given = {name: values[name] for name in names if name in values}
    for name in ("num_hidden_layers", *(name for name, value in given.items() if isinstance(value, int))):
        largest = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        if isinstance(given.get(name), int) and given[name] > largest:
            raise UserError(f"{file}: {name} = {shown(given[name])}: expected at most {largest}")
    try:
        return config_class(**given)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no valid {config_class.__name__}: {reason}") from error


def _built[C: Config](config_class: type[C], values: Mapping[str, Any], where: str) -> C:
    """A config of ours; the error names the file."""
    try:
        return config_class(**values)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def _section(values: Mapping[str, Any], name: str, file: PathLike) -> Mapping[str, Any]:
    """The object that a field holds; an absent one has no fields."""
    value = values.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{file}: {name} = {shown(value)}: expected an object")
    return value or {}


def _known(values: Mapping[str, Any], table: FieldTable) -> dict[str, Any]:
    """The fields that a table reads, of a config that transformers completed."""
    return {name: value for name, value in values.items() if name in table.honoured}


def _listed(value: Any, where: str) -> list[Any]:
    if value is not None and not isinstance(value, list | tuple):
        raise UserError(f"{where} = {shown(value)}: expected a list")
    return list(value or ())


def _sizes(value: Any, file: PathLike) -> list[tuple[int, int]]:
    """The two numbers of each size in pixels."""
    sizes = [
        tuple(one) if isinstance(one, list | tuple) else (one,)
        for one in _listed(value, f"{file}: image_grid_pinpoints")
    ]
    for size in sizes:
        if len(size) != 2 or any(not isinstance(one, int) or not 0 < one <= _LARGEST for one in size):
            raise UserError(f"{file}: image_grid_pinpoints has {shown(list(size))}: expected two numbers of pixels")
    if len(sizes) > _MOST_GRIDS:
        raise UserError(f"{file}: image_grid_pinpoints has {len(sizes)} sizes: expected at most {_MOST_GRIDS}")
    return [(one, other) for one, other in sizes]


def _hidden_state(layer: Any, depth: int, file: PathLike) -> int:
    """The number of a hidden state, which negative numbers count from the last one."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"{file}: vision_feature_layer = {layer!r} is not supported, expected one layer")
    return layer if layer >= 0 else depth + 1 + layer


def _tower(values: Mapping[str, Any], file: PathLike) -> SiglipConfig:
    name = str(values.get("mm_vision_tower", values.get("vision_tower")))
    known = TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if known is None:
        raise UserError(
            f"{file}: mm_vision_tower {name!r} is unknown, give its directory with --encoder; "
            f"known: {', '.join(TOWERS)}"
        )
    return known


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
    aspect: str, pinpoints: Sequence[tuple[int, int]], tile: int, *, unpad: bool, rounding: Any, file: PathLike
) -> ImageConfig:
    limit = re.fullmatch(r"anyres_max_(\d{1,6})", aspect)
    if limit is None and aspect not in ("square", "pad", "anyres"):
        raise UserError(f"{file}: image aspect ratio {aspect!r}: expected square, pad, anyres or anyres_max_N")
    odd = [size for size in pinpoints if size[0] % tile or size[1] % tile]
    if odd:
        raise UserError(f"{file}: image_grid_pinpoints {odd} are no multiples of the tile size {tile}")
    anyres = aspect.startswith("anyres")
    return _built(
        ImageConfig,
        {
            "tile_size": tile,
            "aspect_ratio": "anyres_max" if limit else aspect,
            "grids": tuple((width // tile, height // tile) for width, height in pinpoints) if anyres else (),
            "max_tiles": int(limit[1]) if limit else 9,
            "unpad": unpad,
            "unpad_rounding": rounding,
        },
        str(file),
    )
