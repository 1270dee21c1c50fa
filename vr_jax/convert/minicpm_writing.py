"""Writes the configs of MiniCPM-V 2.0 in the layout of its remote code, and of its decoder alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.minicpm_fields import PROCESSOR_CLASS, SIZES
from vr_jax.convert.minicpm_v import TOWERS, read_minicpm_v
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.projectors.resampler import ResamplerConfig

# Where the remote code is found, which is no part of an export.
HUB_NAME = "openbmb/MiniCPM-V-2"


def is_minicpm(config: TransformerConfig) -> bool:
    """Returns whether a decoder has one of the scales that MiniCPM has and other decoders do not have."""
    return (config.embedding_scale, config.residual_scale, config.logit_scale) != (1, 1, 1)


def write_minicpm(config: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a MiniCPMForCausalLM.

    Raises:
        UserError: The decoder has what MiniCPM does not have.
    """
    plain = TransformerConfig(attention_bias=False)
    for name in ("head_width", "attention_bias", "query_key_norm", "rope_sections"):
        found, expected = getattr(config, name), getattr(plain, name)
        if found != expected:
            raise UserError(f"there is no format for a decoder with {name} = {found}; MiniCPM has {expected}")
    depth, width = math.sqrt(config.num_layers), config.hidden_size
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "scale_emb": _shortest(config.embedding_scale, lambda x: x),
        "scale_depth": _shortest(config.residual_scale * depth, lambda x: x / depth),
        "dim_model_base": _shortest(config.logit_scale * width, lambda x: x / width),
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "use_cache": True,
    }


def write_minicpm_v(config: VlmConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json and preprocessor_config.json of a MiniCPM-V 2.0.

    Where the fields of the remote code cannot describe the model, the field `vr_jax` holds the whole config, which our
    import reads.

    Raises:
        UserError: The encoder, the projector or the decoder is another method.
    """
    encoder, decoder, projector = config.encoder, config.decoder, config.projector
    if not isinstance(decoder, TransformerConfig) or not isinstance(projector, ResamplerConfig):
        raise UserError(
            f"there is no format for the encoder {encoder.name!r} with the projector {projector.name!r} and the "
            f"decoder {decoder.name!r}; MiniCPM-V has 'resampler' and 'transformer'"
        )
    image = config.image
    slicing = {
        "max_slice_nums": image.max_slices,
        "scale_resolution": image.slice_size,
        "patch_size": encoder.patch_size,
    }
    values = {
        **write_minicpm(decoder),
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "auto_map": {
            "AutoConfig": f"{HUB_NAME}--configuration_minicpm.MiniCPMVConfig",
            "AutoModel": f"{HUB_NAME}--modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": f"{HUB_NAME}--modeling_minicpmv.MiniCPMV",
        },
        "vision_encoder": next(iter(TOWERS)),
        "drop_vision_last_layer": encoder.num_layers < next(iter(TOWERS.values())).num_layers,
        "image_size": image.slice_size,
        "query_num": config.cells_per_tile,
        "slice_mode": True,
        "mm_use_im_start_end": True,
        **slicing,
    }
    processor = {
        "image_processor_type": PROCESSOR_CLASS,
        **slicing,
        "image_feature_size": config.cells_per_tile,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "norm_mean": list(image.image_mean),
        "norm_std": list(image.image_std),
    }
    if not _describes(values, config):
        values["vr_jax"] = config.to_dict()
    return values, processor


def _describes(values: Mapping[str, Any], config: VlmConfig) -> bool:
    """Whether a config.json without `vr_jax` is read as a model, but for what is stated elsewhere."""
    try:
        found = read_minicpm_v(values, "config.json")
    except UserError:
        return False
    image = dataclasses.replace(found.image, image_mean=config.image.image_mean, image_std=config.image.image_std)
    projector = config.projector
    if isinstance(projector, ResamplerConfig):
        projector = dataclasses.replace(projector, heads=projector.head_count(config.spec))
    expected = dataclasses.replace(config, projector=projector)
    return dataclasses.replace(found, image=image, dtype=config.dtype) == expected


def _shortest(value: float, inverse: Callable[[float], float]) -> float | int:
    """The shortest decimal near a value that gives the same float as the value in what is computed of it."""
    expected = inverse(value)
    for digits in range(1, 18):
        short = float(f"{value:.{digits}g}")
        if inverse(short) == expected:
            return int(short) if short.is_integer() else short
    return value
