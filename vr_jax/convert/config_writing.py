"""Writes config.json of the foreign formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vr_jax.convert.configs import QWEN2_NAMES, SIGLIP_NAMES, TOWERS
from vr_jax.convert.preprocessing import write_pinpoints
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig

_MAX_POSITIONS = 32768  # that of Qwen2's own configs; our decoder has no limit


def write_siglip(config: SiglipConfig) -> dict[str, Any]:
    """Returns the config.json of a SiglipVisionModel."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **{theirs: getattr(config, ours) for ours, theirs in SIGLIP_NAMES.items()},
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": False,
    }


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Qwen2ForCausalLM.

    Raises:
        UserError: The decoder is another relative of Qwen2.
    """
    plain = TransformerConfig()
    for name in ("head_width", "attention_bias", "query_key_norm", "embedding_scale", "residual_scale", "logit_scale"):
        found, expected = getattr(config, name), getattr(plain, name)
        if found != expected:
            raise UserError(f"there is no format for a decoder with {name} = {found}; Qwen2 has {expected}")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{theirs: getattr(config, ours) for ours, theirs in QWEN2_NAMES.items()},
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        "use_sliding_window": False,
        "use_cache": True,
    }


def hf_llava_obstacle(config: VlmConfig) -> str | None:
    """Returns the part of a model that no class of transformers has, or None if there is a class for the model."""
    if config.refusion is not None:
        return f"re-fusion block {config.refusion.name!r}"
    if config.projector.name != "mlp":
        return f"projector {config.projector.name!r}"
    if not (config.image.is_anyres and config.image.unpad):
        return f"image.aspect_ratio {config.image.aspect_ratio!r} with unpad = {config.image.unpad}"
    return None


def write_hf_llava(config: VlmConfig, image_token: int) -> dict[str, Any]:
    """Returns the config.json of a LLaVA-OneVision or LLaVA-NeXT of transformers.

    Args:
        config: A model without an obstacle (`hf_llava_obstacle`).
        image_token: The id of `<image>` in its tokenizer.
    """
    encoder, decoder = siglip_and_qwen2(config)
    onevision = config.image.aspect_ratio == "anyres_max"
    name = "LlavaOnevision" if onevision else "LlavaNext"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_onevision" if onevision else "llava_next",
        "vision_config": write_siglip(encoder),
        "text_config": write_qwen2(decoder),
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "image_token_index": image_token,
        "image_grid_pinpoints": write_pinpoints(config.image),
        "vision_feature_layer": config.vision_feature_layer - encoder.num_layers - 1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        **(
            {"vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}", "video_token_index": image_token + 1}
            if onevision
            else {"image_seq_length": config.cells_per_tile}
        ),
    }


def write_llava(config: VlmConfig) -> dict[str, Any]:
    """Returns a config.json of LLaVA's own layout.

    LLaVA's fields are for LLaVA's tools. The field `vr_jax` holds the whole config and is what our import reads.
    """
    encoder, decoder = siglip_and_qwen2(config)
    image, tile = config.image, config.image.tile_size
    # The depth is not compared, since an encoder of LLaVA lacks the last layer.
    depths = {name: replace(encoder, num_layers=known.num_layers) for name, known in TOWERS.items()}
    tower = next((name for name, known in TOWERS.items() if known == depths[name]), "siglip")
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


def siglip_and_qwen2(config: VlmConfig) -> tuple[SiglipConfig, TransformerConfig]:
    """Returns a model's encoder and decoder, which the formats of LLaVA need to be SigLIP and Qwen2.

    Raises:
        UserError: One of them is another method.
    """
    if not isinstance(config.encoder, SiglipConfig):
        raise UserError(f"there is no format for the encoder {config.encoder.name!r}, expected 'siglip'")
    if not isinstance(config.decoder, TransformerConfig):
        raise UserError(f"there is no format for the decoder {config.decoder.name!r}, expected 'transformer'")
    return config.encoder, config.decoder
