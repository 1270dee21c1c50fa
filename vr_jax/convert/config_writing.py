"""Writes the config.json of a whole LLaVA in the foreign formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vr_jax.convert.configs import NEXT, ONEVISION, class_of
from vr_jax.convert.decoder_configs import decoder_family, write_decoder
from vr_jax.convert.encoder_configs import TOWERS, encoder_family, write_encoder
from vr_jax.convert.preprocessing import write_pinpoints
from vr_jax.model.config import VlmConfig


def hf_llava_obstacle(config: VlmConfig) -> str | None:
    """Returns the part of a model that no class of transformers has, or None if there is a class for the model."""
    if config.refusion is not None:
        return f"re-fusion block {config.refusion.name!r}"
    if config.projector.name != "mlp":
        return f"projector {config.projector.name!r}"
    if class_of(config) is None:
        return f"image.aspect_ratio {config.image.aspect_ratio!r} with unpad = {config.image.unpad}"
    return None


def write_hf_llava(config: VlmConfig, image_token: int) -> dict[str, Any]:
    """Returns the config.json of a LLaVA-OneVision, LLaVA-NeXT or LLaVA-1.5 of transformers.

    Args:
        config: A model without an obstacle (`hf_llava_obstacle`).
        image_token: The id of `<image>` in its tokenizer.
    """
    kind = class_of(config)
    assert kind is not None
    pinpoints = {} if kind not in (NEXT, ONEVISION) else {"image_grid_pinpoints": write_pinpoints(config.image)}
    return {
        "architectures": [kind.model_class],
        "model_type": kind.model_type,
        "vision_config": write_encoder(config.encoder),
        "text_config": write_decoder(config.decoder),
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "image_token_index": image_token,
        **pinpoints,
        "vision_feature_layer": config.vision_feature_layer - config.encoder.num_layers - 1,
        "vision_feature_select_strategy": encoder_family(config.encoder).select,
        "projector_hidden_act": "gelu",
        **(
            {"vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}", "video_token_index": image_token + 1}
            if kind is ONEVISION
            else {"image_seq_length": config.cells_per_tile}
        ),
    }


def write_llava(config: VlmConfig) -> dict[str, Any]:
    """Returns a config.json of LLaVA's own layout.

    LLaVA's fields are for LLaVA's tools. The field `vr_jax` holds the whole config and is what our import reads.
    """
    encoder, family = config.encoder, decoder_family(config.decoder)
    image, tile = config.image, config.image.tile_size
    # The depth is not compared, since a SigLIP of LLaVA lacks the last layer.
    depths = {name: replace(encoder, num_layers=known.num_layers) for name, known in TOWERS.items()}
    tower = next((name for name, known in TOWERS.items() if known == depths[name]), encoder.name)
    aspect = f"anyres_max_{image.max_tiles}" if image.aspect_ratio == "anyres_max" else image.aspect_ratio
    return {
        **write_decoder(config.decoder),
        "architectures": [family.llava_class],
        "model_type": family.llava_type,
        "mm_vision_tower": tower,
        "mm_hidden_size": encoder.hidden_size,
        "mm_projector_type": "mlp2x_gelu" if config.projector.name in ("mlp", "pool") else config.projector.name,
        "mm_vision_select_layer": config.vision_feature_layer - encoder.num_layers - 1,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad" if image.unpad else "flat",
        # LLaVA crops where its config says "square", if that is what the encoder's processor does.
        "image_aspect_ratio": "square" if aspect == encoder_family(encoder).one_tile else aspect,
        "image_grid_pinpoints": [[columns * tile, rows * tile] for columns, rows in image.grids],
        "vr_jax": config.to_dict(),
    }
