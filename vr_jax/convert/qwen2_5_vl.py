"""Qwen2.5-VL of transformers: the names of its tensors, and its config.json.

config.json is read in both of its forms (`qwen2_5_vl_fields`), and written in that of the released files, which all
versions of transformers read.

A model that transformers has no class for, for example one with Vision Remember, is written under the same names, with
its other tensors beside them. The field `vr_jax` of its config.json holds the whole config, and `VR_MODEL_TYPE` keeps
transformers from loading the rest of it as if it were the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vr_jax.convert.config_values import LARGEST, MOST_LAYERS, built, known, listed, section, with_defaults
from vr_jax.convert.method_tables import DEEPSTACK, PROJECTORS
from vr_jax.convert.qwen2_5_vl_fields import FLAT_FIELDS, NESTED_FIELDS, TEXT_FIELDS, VISION_FIELDS
from vr_jax.convert.tables import (
    HEAD,
    PATCH,
    TEXT,
    TRANSPOSE,
    VISION_REMEMBER,
    Rule,
    Table,
    Transform,
    linear,
    norm,
    prefixed,
)
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import shown
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.projectors.merger import MergerConfig
from vr_jax.storage import PathLike

CLASS, MODEL_TYPE = "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"
VR_CLASS, VR_MODEL_TYPE = "VrJaxQwen2_5_VL", "vr_jax_qwen2_5_vl"
# The tokens of the tokenizer that config.json names, with their ids in the released tokenizer.
TOKENS = {
    "vision_start_token_id": ("<|vision_start|>", 151652),
    "vision_end_token_id": ("<|vision_end|>", 151653),
    "image_token_id": ("<|image_pad|>", 151655),
    "video_token_id": ("<|video_pad|>", 151656),
}
FRAMES = 2  # the temporal slices of the patch embedding's kernel
_MAX_POSITIONS = 128000  # that of the released configs; our decoder has no limit
_ROPE_KINDS = (None, "default", "mrope")


def _sum_of_frames(kernel: np.ndarray) -> np.ndarray:
    """Adds the temporal slices of a kernel (D, 3, 2, p, p), since a still image is two equal frames."""
    return PATCH.to_ours(kernel.astype(np.promote_types(kernel.dtype, np.float32)).sum(axis=2))


def _halves(kernel: np.ndarray) -> np.ndarray:
    """Stores half of the kernel in each slice, which is exact. It inverts `_sum_of_frames` for still images."""
    half = PATCH.to_theirs(kernel) * kernel.dtype.type(0.5)
    return np.stack([half] * FRAMES, axis=2)


_BLOCK = "visual.blocks.{n}"
_LAYERS = "encoder.layers"
VISION: Table = (
    Rule("visual.patch_embed.proj.weight", ("encoder.patch_embed.kernel",), Transform(_sum_of_frames, _halves)),
    *norm(f"{_BLOCK}.norm1", f"{_LAYERS}.norm1", bias=False),
    Rule(f"{_BLOCK}.attn.qkv.weight", tuple(f"{_LAYERS}.attn.{x}.kernel" for x in "qkv"), TRANSPOSE),
    Rule(f"{_BLOCK}.attn.qkv.bias", tuple(f"{_LAYERS}.attn.{x}.bias" for x in "qkv")),
    *linear(f"{_BLOCK}.attn.proj", f"{_LAYERS}.attn.out"),
    *norm(f"{_BLOCK}.norm2", f"{_LAYERS}.norm2", bias=False),
    *linear(f"{_BLOCK}.mlp.gate_proj", f"{_LAYERS}.mlp.gate"),
    *linear(f"{_BLOCK}.mlp.up_proj", f"{_LAYERS}.mlp.up"),
    *linear(f"{_BLOCK}.mlp.down_proj", f"{_LAYERS}.mlp.down"),
)
MERGER: Table = (
    *norm("visual.merger.ln_q", "projector.norm", bias=False),
    *linear("visual.merger.mlp.0", "projector.fc1"),
    *linear("visual.merger.mlp.2", "projector.fc2"),
)
DECODER: Table = (*prefixed("model.", TEXT), *HEAD)
# In memory, transformers 5 has `model.` before every name but that of the head.
RENAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
IN_MEMORY = ((r"^visual\.", "model.visual."), (r"^model\.", "model.language_model."))
VR_PROJECTORS: Mapping[str, Table] = {
    **{name: prefixed("visual.projector.", table) for name, table in PROJECTORS.items()},
    "merger": MERGER,
}
VR_REFUSION: Mapping[str, Table] = {"deepstack": DEEPSTACK, "vision_remember": prefixed("vr.", VISION_REMEMBER)}

# The fields of transformers' configs, by our names.
_VISION_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "depth",
    "num_heads": "num_heads",
}
_TEXT_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
}


def read_config(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads the config.json of a Qwen2.5-VL. Its image processor says what is done with images.

    Args:
        values: The fields of the file.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    from transformers import Qwen2_5_VLConfig

    nested = values.get("text_config") is not None
    text, where = (section(values, "text_config", file), f"{file}: text_config") if nested else (values, str(file))
    vision = section(values, "vision_config", file)
    (NESTED_FIELDS if nested else FLAT_FIELDS).check(values, str(file))
    VISION_FIELDS.check(vision, f"{file}: vision_config")
    if nested:
        TEXT_FIELDS.check(text, where)
    sections = _rope_sections(text, where)
    if nested:
        _check_agreement(values, text, sections, file)
    given = {
        **({"text_config": known(text, TEXT_FIELDS)} if nested else known(text, TEXT_FIELDS)),
        "vision_config": known(vision, VISION_FIELDS),
        **{name: values[name] for name in ("tie_word_embeddings", *TOKENS) if name in values},
    }
    _check_numbers(known(text, TEXT_FIELDS), where)
    _check_numbers(known(vision, VISION_FIELDS), f"{file}: vision_config")
    full = with_defaults(Qwen2_5_VLConfig, given, given, file)
    encoder = _read_vision(full.vision_config, f"{file}: vision_config")
    decoder = _read_text(full.text_config, sections, bool(full.tie_word_embeddings), where)
    for name, found in (("head_dim", decoder.head_dim), ("out_hidden_size", decoder.hidden_size)):
        stated = text.get(name) if name == "head_dim" else full.vision_config.out_hidden_size
        if stated not in (None, found):
            raise UserError(f"{file}: {name} = {shown(stated)} does not fit the decoder, expected {found}")
    return built(
        VlmConfig,
        {
            "encoder": encoder,
            "decoder": decoder,
            "projector": MergerConfig(stride=full.vision_config.spatial_merge_size),
            "image": ImageConfig(tile_size=encoder.image_size, aspect_ratio="native", unpad=False),
            "vision_feature_layer": encoder.num_layers,
            "image_token_id": full.image_token_id,
            "template": "qwen2_vl",
        },
        str(file),
    )


def read_vr_config(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads a config.json that `write_config` wrote for a model that transformers has no class for.

    Raises:
        UserError: The config is not valid.
    """
    found = section(values, "vr_jax", file)
    if not found:
        raise UserError(f"{file}: the field 'vr_jax' is absent, which holds the config of a {VR_CLASS}")
    try:
        return VlmConfig.from_dict(found)
    except ConfigError as error:
        raise UserError(f"{file}: vr_jax: {error}") from None


def obstacle(config: VlmConfig) -> str | None:
    """Returns the part of a model that transformers' class does not have, or None if it is a Qwen2.5-VL."""
    if config.refusion is not None:
        return f"re-fusion block {config.refusion.name!r}"
    if config.projector.name != "merger":
        return f"projector {config.projector.name!r}"
    if not isinstance(config.decoder, TransformerConfig):
        return f"decoder {config.decoder.name!r}"
    if config.vision_feature_layer != config.encoder.num_layers:
        return f"vision_feature_layer = {config.vision_feature_layer} of {config.encoder.num_layers} layers"
    plain = TransformerConfig()
    for name in ("head_width", "attention_bias", "query_key_norm", "embedding_scale", "residual_scale", "logit_scale"):
        if getattr(config.decoder, name) != getattr(plain, name):
            return f"decoder.{name} = {getattr(config.decoder, name)}"
    return None if config.decoder.rope_sections else "rotary positions of one axis (decoder.rope_sections)"


def write_config(config: VlmConfig, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Returns the config.json of a model with this vision tower.

    Args:
        config: The model. Where transformers has no class for it (`obstacle`), the result names `VR_CLASS`.
        tokens: The ids of `TOKENS`, by their fields.
    """
    encoder, decoder = config.encoder, config.decoder
    assert isinstance(encoder, Qwen25VisionConfig)
    if obstacle(config) is not None:
        return {
            "architectures": [VR_CLASS],
            "model_type": VR_MODEL_TYPE,
            **tokens,
            "vr_jax": config.to_dict(),
        }
    assert isinstance(decoder, TransformerConfig)
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        **tokens,
        **{theirs: getattr(decoder, ours) for ours, theirs in _TEXT_NAMES.items()},
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.rope_sections or ())},
        "use_sliding_window": False,
        "use_cache": True,
        "vision_config": {
            "model_type": MODEL_TYPE,
            **{theirs: getattr(encoder, ours) for ours, theirs in _VISION_NAMES.items()},
            "hidden_act": "silu",
            "in_channels": 3,
            "out_hidden_size": decoder.hidden_size,
            "patch_size": encoder.patch_size,
            "spatial_merge_size": config.projector.stride,
            "temporal_patch_size": FRAMES,
            "window_size": encoder.image_size,
            "fullatt_block_indexes": list(encoder.full_attention_layers),
        },
    }


def _check_agreement(
    values: Mapping[str, Any], text: Mapping[str, Any], sections: tuple[int, int, int], file: PathLike
) -> None:
    """Raises UserError if a field of the decoder stands outside of `text_config` too, with another value.

    transformers 4.52 to 4.56 write the fields in both places and read the outer ones; transformers 5 reads the inner
    ones.
    """
    for name in (*_TEXT_NAMES.values(), "rope_theta"):
        outer, inner = values.get(name), text.get(name)
        if outer is not None and inner is not None and outer != inner:
            raise UserError(
                f"{file}: {name} = {shown(outer)}, but text_config has {shown(inner)}, and versions of transformers "
                "differ in which they read; set both to the value that the model was trained with"
            )
    if any(values.get(name) for name in ("rope_scaling", "rope_parameters")):
        outer = _rope_sections(values, str(file))
        if outer != sections:
            raise UserError(
                f"{file}: mrope_section = {list(outer)}, but text_config has {list(sections)}; set both to the same"
            )


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a number of a section is so large that it would fill the memory."""
    for name, value in values.items():
        largest = MOST_LAYERS if name in ("depth", "num_hidden_layers") else LARGEST
        if isinstance(value, int) and value > largest:
            raise UserError(f"{where}: {name} = {shown(value)}: expected at most {largest}")


def _rope_sections(values: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """The frequencies of each axis; every other kind of rotary positions is refused."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        for field, value in section(values, name, where).items():
            if field in ("type", "rope_type"):
                if value not in _ROPE_KINDS:
                    raise UserError(
                        f"{where}: {name} has {field} = {shown(value)}, which is not supported, expected 'default' or "
                        "'mrope'"
                    )
            elif field == "mrope_section":
                found[field] = value
            elif field != "rope_theta" and (field, value) != ("partial_rotary_factor", 1.0):
                raise UserError(f"{where}: {name} has {field} = {shown(value)}, which is not supported; remove it")
    sizes = listed(found.get("mrope_section"), f"{where}: mrope_section")
    if len(sizes) != 3 or any(isinstance(one, bool) or not isinstance(one, int) for one in sizes):
        raise UserError(
            f"{where}: mrope_section = {shown(found.get('mrope_section'))}: expected the numbers of rotary frequencies "
            "of time, rows and columns, as [16, 24, 24]"
        )
    return sizes[0], sizes[1], sizes[2]


def _read_vision(full: Any, where: str) -> Qwen25VisionConfig:
    """The encoder, from the completed `vision_config`."""
    patch, merge = full.patch_size, full.spatial_merge_size
    if isinstance(patch, list | tuple):
        if len(set(patch)) != 1:
            raise UserError(f"{where}: patch_size = {shown(list(patch))} is not supported, expected a square")
        patch = patch[0]
    cells = full.window_size // merge // patch if merge > 0 and patch > 0 else 0
    if cells < 1:
        raise UserError(
            f"{where}: window_size = {shown(full.window_size)} with patch_size = {shown(patch)} and "
            f"spatial_merge_size = {shown(merge)}: expected a window of at least one merged cell"
        )
    rope = full.rope_parameters or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"{where}: rope type {shown(rope['rope_type'])} is not supported, expected 'axial'")
    indexes = listed(full.fullatt_block_indexes, f"{where}: fullatt_block_indexes")
    return built(
        Qwen25VisionConfig,
        {
            **{ours: getattr(full, theirs) for ours, theirs in _VISION_NAMES.items()},
            "patch_size": patch,
            "image_size": cells * merge * patch,
            "full_attention_layers": tuple(indexes),
            "rope_theta": float(rope.get("rope_theta", 10_000.0)),
        },
        where,
    )


def _read_text(full: Any, sections: tuple[int, int, int], tied: bool, where: str) -> TransformerConfig:
    """The decoder, from the completed `text_config`."""
    kinds = listed(full.layer_types, f"{where}: layer_types")
    if len(kinds) != full.num_hidden_layers:
        raise UserError(
            f"{where}: layer_types names {len(kinds)} layers, expected as many as num_hidden_layers = "
            f"{full.num_hidden_layers}"
        )
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise UserError(f"{where}: layer_types has {other[0]!r}, which is not supported, expected 'full_attention'")
    return built(
        TransformerConfig,
        {
            **{ours: getattr(full, theirs) for ours, theirs in _TEXT_NAMES.items()},
            "rope_theta": full.rope_parameters["rope_theta"],
            "rope_sections": sections,
            "tie_word_embeddings": tied,
        },
        where,
    )
