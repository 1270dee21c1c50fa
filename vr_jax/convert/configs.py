"""Translates config.json of the foreign formats to `VlmConfig` and back.

A field that changes what the model computes, and that our model does not have, stops the import.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vr_jax.errors import UserError
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.storage import PathLike

IMAGE_TOKEN = 151646  # the id of `<image>` in the tokenizers of llava-onevision-qwen2
_MAX_POSITIONS = 32768  # that of Qwen2's own configs; our decoder has no limit

# The fields of transformers' configs, by our names.
_SIGLIP_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "layer_norm_eps",
}
_QWEN2_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Fields that our model supports with these values only; the first one is the default.
_SIGLIP_FIXED = {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)}
_QWEN2_FIXED = {"hidden_act": ("silu",), "use_sliding_window": (False,), "quantization_config": (None,)}
_HF_LLAVA_FIXED = {
    "vision_feature_select_strategy": ("full",),  # "default" drops the first patch as if it were a CLS token
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "quantization_config": (None,),
}
_LLAVA_FIXED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "quantization_config": (None,),
}
# LLaVA's config.json names its encoder and does not describe it.
_TOWERS = {
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

    values = values.get("vision_config", values)
    _require(values, _SIGLIP_FIXED, file)
    full = _with_defaults(SiglipVisionConfig, values, _SIGLIP_FIELDS.values(), file)
    return SiglipConfig(**{ours: getattr(full, theirs) for ours, theirs in _SIGLIP_FIELDS.items()})


def write_siglip(config: SiglipConfig) -> dict[str, Any]:
    """Returns the config.json of a SiglipVisionModel."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **{theirs: getattr(config, ours) for ours, theirs in _SIGLIP_FIELDS.items()},
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": False,
    }


def read_qwen2(values: Mapping[str, Any], file: PathLike) -> Qwen2Config:
    """Reads the config of a decoder.

    Args:
        values: A config.json of Qwen2ForCausalLM or of LLaVA's own layout, or the `text_config` of a LLaVA.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our decoder does not support it.
    """
    from transformers import Qwen2Config as HfQwen2Config

    _require(values, _QWEN2_FIXED, file)
    names = (*_QWEN2_FIELDS.values(), "rope_theta", "rope_scaling", "rope_parameters")
    full = _with_defaults(HfQwen2Config, values, names, file)
    rope = full.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{file}: rope type {rope['rope_type']!r} is not supported, expected 'default'")
    config = Qwen2Config(
        **{ours: getattr(full, theirs) for ours, theirs in _QWEN2_FIELDS.items()}, rope_theta=rope["rope_theta"]
    )
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{file}: head_dim = {values['head_dim']}, expected hidden_size / heads = {config.head_dim}")
    return config


def write_qwen2(config: Qwen2Config) -> dict[str, Any]:
    """Returns the config.json of a Qwen2ForCausalLM."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{theirs: getattr(config, ours) for ours, theirs in _QWEN2_FIELDS.items()},
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        "use_sliding_window": False,
        "use_cache": True,
    }


def read_hf_llava(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads the config of a LLaVA-OneVision or LLaVA-NeXT of transformers that consists of SigLIP and Qwen2.

    Args:
        values: The config.json.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our model does not support it.
    """
    from transformers import LlavaNextConfig, LlavaOnevisionConfig

    onevision = values.get("model_type") == "llava_onevision"
    for section, expected in (("vision_config", "siglip_vision_model"), ("text_config", "qwen2")):
        default = expected if onevision else "absent"
        found = values.get(section, {}).get("model_type", default)
        if found != expected:
            raise UserError(f"{file}: {section}.model_type is {found!r}, expected {expected!r}")
    config_class = LlavaOnevisionConfig if onevision else LlavaNextConfig
    names = (
        *("vision_config", "text_config", "vision_feature_layer", "image_grid_pinpoints", "tie_word_embeddings"),
        *("vision_aspect_ratio", *_HF_LLAVA_FIXED),
    )
    full = _with_defaults(config_class, values, names, file)
    _require({name: getattr(full, name, None) for name in _HF_LLAVA_FIXED}, _HF_LLAVA_FIXED, file)
    vision = read_siglip(full.vision_config.to_dict(), file)
    text = dict(full.text_config.to_dict())
    # The inner field ties the embeddings in transformers 4, the outer one in transformers 5.
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings")) or full.tie_word_embeddings
    aspect = full.vision_aspect_ratio if onevision else "anyres"
    pinpoints = [(width, height) for height, width in full.image_grid_pinpoints]
    image = _image_config(aspect, pinpoints, vision.image_size, unpad=True, rounding="round7", file=file)
    return VlmConfig(
        encoder=vision,
        decoder=read_qwen2(text, file),
        projector=MlpConfig(),
        image=image,
        vision_feature_layer=_hidden_state(full.vision_feature_layer, vision.num_layers, file),
    )


def hf_llava_obstacle(config: VlmConfig) -> str | None:
    """Returns the part of a model that no class of transformers has, or None if there is a class for the model."""
    if config.refusion is not None:
        return f"re-fusion block {config.refusion.name!r}"
    if config.projector.name != "mlp":
        return f"projector {config.projector.name!r}"
    if not (config.image.is_anyres and config.image.unpad):
        return f"image.aspect_ratio {config.image.aspect_ratio!r} with unpad = {config.image.unpad}"
    return None


def write_hf_llava(config: VlmConfig, image_token: int = IMAGE_TOKEN) -> dict[str, Any]:
    """Returns the config.json of a LLaVA-OneVision or LLaVA-NeXT of transformers.

    Args:
        config: A model without an obstacle (`hf_llava_obstacle`).
        image_token: The id of `<image>` in its tokenizer.
    """
    encoder, decoder = siglip_and_qwen2(config)
    onevision = config.image.aspect_ratio == "anyres_max"
    tile = config.image.tile_size
    name = "LlavaOnevision" if onevision else "LlavaNext"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_onevision" if onevision else "llava_next",
        "vision_config": write_siglip(encoder),
        "text_config": write_qwen2(decoder),
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "image_token_index": image_token,
        "image_grid_pinpoints": [[rows * tile, columns * tile] for columns, rows in config.image.grids],
        "vision_feature_layer": config.vision_feature_layer - encoder.num_layers - 1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        **(
            {"vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}", "video_token_index": image_token + 1}
            if onevision
            else {"image_seq_length": config.cells_per_tile}
        ),
    }


def read_llava(
    values: Mapping[str, Any],
    file: PathLike,
    *,
    own_layers: int,
    encoder: SiglipConfig | None,
    decoder: Qwen2Config | None,
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
        return VlmConfig.from_dict(values["vr_jax"])
    _require(values, _LLAVA_FIXED, file)
    if encoder is None:
        encoder = _tower(values, file)
    depth = encoder.num_layers
    if own_layers:
        encoder = replace(encoder, num_layers=own_layers)
    aspect = values.get("image_aspect_ratio") or "square"
    unpad = values.get("mm_patch_merge_type") == "spatial_unpad"
    pinpoints = _pinpoints(values.get("image_grid_pinpoints"), encoder.image_size, file)
    return VlmConfig(
        encoder=encoder,
        decoder=decoder or read_qwen2(values, file),
        projector=MlpConfig(),
        image=_image_config(aspect, pinpoints, encoder.image_size, unpad=unpad, rounding="truncate", file=file),
        # LLaVA deletes the encoder's last layer and takes the output of the others (LLaVA-NeXT:llava/model/
        # multimodal_encoder/siglip_encoder.py).
        vision_feature_layer=depth - 1,
    )


def write_llava(config: VlmConfig) -> dict[str, Any]:
    """Returns a config.json of LLaVA's own layout.

    LLaVA's fields are for LLaVA's tools. The field `vr_jax` holds the whole config and is what our import reads.
    """
    encoder, decoder = siglip_and_qwen2(config)
    image, tile = config.image, config.image.tile_size
    # The depth is not compared, since an encoder of LLaVA lacks the last layer.
    depths = {name: replace(encoder, num_layers=known.num_layers) for name, known in _TOWERS.items()}
    tower = next((name for name, known in _TOWERS.items() if known == depths[name]), "siglip")
    return {
        **write_qwen2(decoder),
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "mm_vision_tower": f"google/{tower}",
        "mm_hidden_size": encoder.hidden_size,
        "mm_projector_type": "mlp2x_gelu" if config.projector.name in ("mlp", "pool") else config.projector.name,
        "mm_vision_select_layer": config.vision_feature_layer - encoder.num_layers - 1,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad" if image.unpad else "flat",
        "image_aspect_ratio": f"anyres_max_{image.max_tiles}"
        if image.aspect_ratio == "anyres_max"
        else image.aspect_ratio,
        "image_grid_pinpoints": [[columns * tile, rows * tile] for columns, rows in image.grids],
        "vr_jax": config.to_dict(),
    }


def siglip_and_qwen2(config: VlmConfig) -> tuple[SiglipConfig, Qwen2Config]:
    """Returns a model's encoder and decoder, which the formats of LLaVA need to be SigLIP and Qwen2.

    Raises:
        UserError: One of them is another method.
    """
    if not isinstance(config.encoder, SiglipConfig):
        raise UserError(f"there is no format for the encoder {config.encoder.name!r}, expected 'siglip'")
    if not isinstance(config.decoder, Qwen2Config):
        raise UserError(f"there is no format for the decoder {config.decoder.name!r}, expected 'qwen2'")
    return config.encoder, config.decoder


def _with_defaults(config_class: Any, values: Mapping[str, Any], names: Any, file: PathLike) -> Any:
    """A config object of transformers, which fills in the fields that a config.json leaves out."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**{name: values[name] for name in names if name in values})
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no valid {config_class.__name__}: {reason}") from error


def _require(values: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]], file: PathLike) -> None:
    """Refuses a field whose value is not among those that our model supports."""
    for name, allowed in fixed.items():
        found = values.get(name, allowed[0])
        if found not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{file}: {name} = {found!r} is not supported, expected {expected}")


def _hidden_state(layer: Any, depth: int, file: PathLike) -> int:
    """The number of a hidden state, which negative numbers count from the last one."""
    if not isinstance(layer, int):
        raise UserError(f"{file}: vision_feature_layer = {layer!r} is not supported, expected one layer")
    return layer if layer >= 0 else depth + 1 + layer


def _tower(values: Mapping[str, Any], file: PathLike) -> SiglipConfig:
    name = str(values.get("mm_vision_tower", values.get("vision_tower")))
    known = _TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if known is None:
        raise UserError(
            f"{file}: mm_vision_tower {name!r} is unknown, give its directory with --encoder; "
            f"known: {', '.join(_TOWERS)}"
        )
    return known


def _pinpoints(value: Any, tile: int, file: PathLike) -> list[tuple[int, int]]:
    """The sizes (width, height) in pixels that LLaVA gives as a list, as its text, or as "(1x1),...,(6x6)"."""
    if value is None:
        return []
    if isinstance(value, str):
        corners = re.findall(r"\((\d+)x(\d+)\)", value)
        if corners:
            (left, top), (right, bottom) = ((int(a), int(b)) for a, b in (corners[0], corners[-1]))
            return [(i * tile, j * tile) for i in range(left, right + 1) for j in range(top, bottom + 1)]
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{file}: image_grid_pinpoints {value!r} is not a list of sizes") from None
    return [(int(width), int(height)) for width, height in value]


def _image_config(
    aspect: str, pinpoints: Sequence[tuple[int, int]], tile: int, *, unpad: bool, rounding: Any, file: PathLike
) -> ImageConfig:
    limit = re.fullmatch(r"anyres_max_(\d+)", aspect)
    if limit is None and aspect not in ("square", "pad", "anyres"):
        raise UserError(f"{file}: image aspect ratio {aspect!r}: expected square, pad, anyres or anyres_max_N")
    odd = [size for size in pinpoints if size[0] % tile or size[1] % tile]
    if odd:
        raise UserError(f"{file}: image_grid_pinpoints {odd} are no multiples of the tile size {tile}")
    anyres = aspect.startswith("anyres")
    return ImageConfig(
        tile_size=tile,
        aspect_ratio="anyres_max" if limit else aspect,  # type: ignore[arg-type]
        grids=tuple((width // tile, height // tile) for width, height in pinpoints) if anyres else (),
        max_tiles=int(limit[1]) if limit else 9,
        unpad=unpad,
        unpad_rounding=rounding,
    )
