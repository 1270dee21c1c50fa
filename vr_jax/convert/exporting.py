"""Writes a model directory as safetensors, in the layout of Hugging Face or of LLaVA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vr_jax.convert import qwen2_5_vl, qwen2_5_vl_processor
from vr_jax.convert.config_writing import hf_llava_obstacle, write_hf_llava, write_llava
from vr_jax.convert.decoder_configs import decoder_family, write_decoder
from vr_jax.convert.encoder_configs import encoder_family, write_encoder
from vr_jax.convert.folder import IMAGE_PROCESSOR_FILE
from vr_jax.convert.formats import (
    ARCHITECTURES,
    HF_LLAVA,
    LLAVA,
    MINICPM,
    MINICPM_V,
    QWEN2_5_VL,
    VR_QWEN2_5_VL,
    Architecture,
)
from vr_jax.convert.minicpm_writing import is_minicpm, write_minicpm, write_minicpm_v
from vr_jax.convert.preprocessing import write_image_processor
from vr_jax.convert.processor_export import complete_export, portable_tokenizer
from vr_jax.convert.tables import slots
from vr_jax.convert.weights import write_safetensors
from vr_jax.errors import UserError
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.registry import DecoderConfig, EncoderConfig
from vr_jax.model_directory import PIXELS, copy_side_files, load_params, read_sections
from vr_jax.storage import Path, PathLike, UploadedFolder, as_path, complete_directory, write_json

SHARD_BYTES = 5_000_000_000
IMAGE_TOKEN = 151646  # the id of `<image>` in the tokenizers of llava-onevision-qwen2

logger = logging.getLogger("vr_jax.convert")


def export_checkpoint(
    source: PathLike,
    target: PathLike,
    *,
    layout: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Writes safetensors, their index, config.json and the files of the tokenizer.

    Args:
        source: A model directory, also one of an encoder or a decoder alone.
        target: The directory to write, which appears only when it is complete.
        layout: "hf" for names that transformers loads, "llava" for those of LLaVA, which cover every model. None
            takes "hf" where transformers has the model. An encoder or a decoder alone is always written as "hf".
        max_shard_bytes: Size of the largest file, unless one tensor is larger.
        overwrite: Whether an existing directory is replaced.
        report: Receives one line about the result.

    Raises:
        UserError: The source cannot be read, the layout has no place for the model, or the target cannot be written.
    """
    source, target = as_path(source), as_path(target)
    sections = read_sections(source)
    architecture, config = choose_format(sections, source, layout)
    params = load_params(source)
    if architecture in (HF_LLAVA, MINICPM_V, QWEN2_5_VL, VR_QWEN2_5_VL) and not sections["image"]["unpad"]:
        params.pop("image_newline", None)  # which no token stands for, and its class does not have
    places = slots(architecture.table(architecture.sections, sections), params)
    sizes = {
        name: int(np.prod(slot.shape)) * params[slot.paths[0]].dtype.itemsize for name, slot in sorted(places.items())
    }
    dtypes = {array.dtype for array in params.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    computed = {name: compute(sections).astype(dtype) for name, compute in architecture.computed.items()}
    sizes = dict(sorted((sizes | {name: array.nbytes for name, array in computed.items()}).items()))
    config["torch_dtype"] = str(dtype)
    with (
        complete_directory(target, size=sum(sizes.values()), overwrite=overwrite) as folder,
        UploadedFolder(folder) as files,
    ):
        written = files.local
        copy_side_files(source, written)
        portable_tokenizer(written)
        if architecture is HF_LLAVA:
            whole = VlmConfig.from_dict(dict(sections))
            token = complete_export(written, whole, report)
            config |= write_hf_llava(whole, whole.image_token_id or IMAGE_TOKEN if token is None else token)
        elif architecture in (QWEN2_5_VL, VR_QWEN2_5_VL):
            whole = VlmConfig.from_dict(dict(sections))
            config |= qwen2_5_vl.write_config(whole, qwen2_5_vl_processor.complete_export(written, whole, report))
        elif architecture is MINICPM_V:
            fields, processor = write_minicpm_v(VlmConfig.from_dict(dict(sections)))
            config |= fields
            write_json(written / IMAGE_PROCESSOR_FILE, processor)
        elif architecture.encoder is not None:
            tile, own = sections["encoder"]["image_size"], architecture.encoder.one_tile
            image = ImageConfig.from_dict({**sections[PIXELS], "tile_size": tile, "aspect_ratio": own})
            write_json(written / IMAGE_PROCESSOR_FILE, write_image_processor(image, architecture.encoder.processor))
        host = {path: np.asarray(array) for path, array in params.items()}

        def take(name: str) -> np.ndarray:
            return computed[name] if name in computed else places[name].take(host)

        write_safetensors(written, sizes, take, max_shard_bytes)
        write_json(written / "config.json", config)
        files.upload()
    report(f"{target}: {architecture.name}, {len(sizes)} tensors, {sum(sizes.values()) / 1e6:,.1f} MB")


def choose_format(
    sections: Mapping[str, Any], source: Path, layout: str | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """Returns the format of a model, and its config.json, unless that depends on the tokenizer.

    Args:
        sections: The sections of the model.
        source: Its model directory, for messages.
        layout: "hf", "llava" or None, as for `export_checkpoint`.

    Raises:
        UserError: The layout, or any, has no place for the model.
    """
    parts = {name: value for name, value in sections.items() if value is not None}
    parts.pop(PIXELS, None)
    if set(parts) in ({"encoder"}, {"decoder"}):
        if layout == "llava":
            raise UserError(f"{source} holds only {next(iter(parts))}: layout 'llava' needs a whole model")
        if "encoder" in parts:
            encoder = EncoderConfig.from_dict(parts["encoder"])
            family = encoder_family(encoder)
            return next(one for one in ARCHITECTURES if one.encoder is family), write_encoder(encoder)
        decoder = DecoderConfig.from_dict(parts["decoder"])
        if isinstance(decoder, TransformerConfig) and is_minicpm(decoder):
            return MINICPM, write_minicpm(decoder)
        text = decoder_family(decoder)
        return next(one for one in ARCHITECTURES if one.decoder is text), write_decoder(decoder)
    if "image" not in parts:
        raise UserError(f"{source} holds parts of a model ({', '.join(sorted(parts))}); there is no format for that")
    config = VlmConfig.from_dict(dict(sections))
    if isinstance(config.encoder, Qwen25VisionConfig):
        return _native(config, source, layout), {}
    if config.encoder.name == "siglip_slices":
        if layout == "llava":
            raise UserError(
                f"{source}: LLaVA's layout has no place for the encoder 'siglip_slices'; leave --layout out, which "
                "writes that of MiniCPM-V"
            )
        return MINICPM_V, {}
    encoder_family(config.encoder), decoder_family(config.decoder)  # they are refused here if no format has them
    obstacle = hf_llava_obstacle(config)
    if layout == "hf" and obstacle:
        raise UserError(f"{source}: transformers has no model with {obstacle}; use --layout llava")
    if layout == "llava" or obstacle:
        return LLAVA, write_llava(config)
    return HF_LLAVA, {}


def _native(config: VlmConfig, source: Path, layout: str | None) -> Architecture:
    """The format of a whole model with Qwen2.5-VL's vision tower."""
    obstacle = qwen2_5_vl.obstacle(config)
    if layout == "llava":
        raise UserError(
            f"{source}: LLaVA's layout has no place for the encoder {config.encoder.name!r}; leave --layout out"
        )
    if layout == "hf" and obstacle:
        raise UserError(
            f"{source}: transformers has no model with {obstacle}; leave --layout out for a layout of our own"
        )
    return VR_QWEN2_5_VL if obstacle else QWEN2_5_VL
