"""Reads the configs of MiniCPM-V 2.0 in the layout of its remote code, and of its decoder alone.

Source: openbmb/MiniCPM-V-2 `configuration_minicpm.py` and `image_processing_minicpmv.py`, openbmb/MiniCPM-2B-sft-bf16
`configuration_minicpm.py`. No code of a folder is run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.config_values import built, section
from vr_jax.convert.folder import ForeignFolder
from vr_jax.convert.minicpm_fields import (
    MARKERS,
    MINICPM_FIELDS,
    MINICPM_V_FIELDS,
    PROCESSOR_CLASS,
    PROCESSOR_FIELDS,
    SCALES,
    SIZES,
)
from vr_jax.convert.preprocessing import SIGLIP_MEAN, SIGLIP_STD
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import shown
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig
from vr_jax.model.projectors.resampler import ResamplerConfig
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

# config.json names the vision tower as timm does, and does not describe it.
TOWERS = {"vit_so400m_patch14_siglip_384.webli": SiglipSlicesConfig(num_layers=27)}
# The channels of a head of the resampler, which its official code fixes.
HEAD_CHANNELS = 128
# A tile slot has so many more patches per side than a slice of a square image (docs/data.md#slices).
_SPARE_PATCHES = 2
_LATER = ("version", "slice_config", "vision_config", "audio_config", "tts_config", "batch_vision_input")


def read_minicpm(values: Mapping[str, Any], file: PathLike, table: FieldTable = MINICPM_FIELDS) -> TransformerConfig:
    """Reads the config of a decoder.

    Args:
        values: A config.json of MiniCPMForCausalLM, or of MiniCPM-V 2.0, which holds the decoder's fields too.
        file: Its path, for messages.
        table: The fields that it may have.

    Raises:
        UserError: The config is not valid, lacks a field, or our decoder does not support it.
    """
    where = str(file)
    table.check(values, where)
    _check_present(values, (*SIZES.values(), *SCALES), where, optional=("num_key_value_heads",))
    found = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    if found["num_kv_heads"] is None:
        found["num_kv_heads"] = found["num_heads"]
    scales = {name: values[name] for name in SCALES}
    for name in ("num_hidden_layers", "hidden_size"):
        _check_number(values[name], f"{where}: {name}", whole=True)
    for name, value in scales.items():
        _check_number(value, f"{where}: {name}")
    return built(
        TransformerConfig,
        {
            **found,
            "attention_bias": False,
            "embedding_scale": float(scales["scale_emb"]),
            "residual_scale": scales["scale_depth"] / math.sqrt(values["num_hidden_layers"]),
            "logit_scale": scales["dim_model_base"] / values["hidden_size"],
        },
        where,
    )


def read_minicpm_v(values: Mapping[str, Any], file: PathLike) -> VlmConfig:
    """Reads the config of a MiniCPM-V 2.0, also one that our export wrote.

    Args:
        values: The config.json.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, is that of a later MiniCPM-V, lacks a field, or our model does not support
            it.
    """
    where = str(file)
    for name in _LATER:
        if values.get(name) is not None:
            raise UserError(
                f"{where}: {name} = {shown(values[name])}: MiniCPM-V 2.5 and later have this field, and are other "
                "models; expected the config.json of MiniCPM-V 2.0"
            )
    if values.get("vr_jax") is not None:
        try:
            return VlmConfig.from_dict(section(values, "vr_jax", file))
        except ConfigError as error:
            raise UserError(f"{where}: vr_jax: {error}") from None
    decoder = read_minicpm(values, file, MINICPM_V_FIELDS)
    own = ("vision_encoder", "drop_vision_last_layer", "slice_mode", "query_num", "patch_size")
    _check_present(values, (*own, "max_slice_nums", "scale_resolution"), where)
    for name in ("query_num", "max_slice_nums", "scale_resolution", "patch_size"):
        _check_number(values[name], f"{where}: {name}", whole=True)
    tower = _tower(values, where)
    slot = values["scale_resolution"] // tower.patch_size + _SPARE_PATCHES
    encoder = dataclasses.replace(tower, image_size=slot * tower.patch_size)
    queries = values["query_num"]
    if math.isqrt(queries) ** 2 != queries:
        raise UserError(f"{where}: query_num = {queries} is not supported, expected a square number, as 64")
    image = ImageConfig(
        tile_size=encoder.image_size,
        aspect_ratio="slices",
        unpad=False,
        slice_size=values["scale_resolution"],
        max_slices=values["max_slice_nums"],
    )
    return built(
        VlmConfig,
        {
            "encoder": encoder,
            "decoder": decoder,
            "projector": ResamplerConfig(
                queries=math.isqrt(queries), heads=max(1, decoder.hidden_size // HEAD_CHANNELS)
            ),
            "image": image,
            "vision_feature_layer": encoder.last_level,
            "template": "minicpm_v",
        },
        where,
    )


def with_slices(config: VlmConfig, folder: ForeignFolder, report: Callable[[str], None]) -> VlmConfig:
    """Adds what preprocessor_config.json says of a MiniCPM-V 2.0 to the model's config.

    Args:
        config: The model, as config.json describes it.
        folder: Its folder.
        report: Receives a line where the folder says nothing about pixels.

    Raises:
        UserError: The processor does what is not computed here, or contradicts config.json.
    """
    if folder.image_processor is None:
        report(
            f"{folder.directory} has no preprocessor_config.json: images are cut and normalised as config.json and the "
            "remote code of MiniCPM-V 2.0 say"
        )
        return config
    values, where = folder.image_processor.values, folder.image_processor.where
    PROCESSOR_FIELDS.check(values, where)
    expected = {
        "image_processor_type": PROCESSOR_CLASS,
        "max_slice_nums": config.image.max_slices,
        "scale_resolution": config.image.slice_size,
        "patch_size": config.encoder.patch_size,
        "image_feature_size": config.cells_per_tile,
    }
    for name, value in expected.items():
        if values.get(name) not in (None, value):
            raise UserError(
                f"{where}: {name} = {shown(values[name])} does not fit config.json, whose model has {value!r}; set "
                "both to the same"
            )
    pixels: dict[str, Any] = {}
    for ours, theirs, default in (("image_mean", "norm_mean", SIGLIP_MEAN), ("image_std", "norm_std", SIGLIP_STD)):
        value = default if values.get(theirs) is None else values[theirs]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: {theirs} = {shown(value)}: expected the numbers of red, green and blue")
        pixels[ours] = tuple(value)
    try:
        return dataclasses.replace(config, image=dataclasses.replace(config.image, **pixels))
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def marker_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids that a config.json gives the markers of images, by their text."""
    return {text: values[name] for name, text in MARKERS.items() if values.get(name) is not None}


def _tower(values: Mapping[str, Any], where: str) -> SiglipSlicesConfig:
    """The vision tower, without its last block where that is dropped."""
    name, drop = str(values["vision_encoder"]), values["drop_vision_last_layer"]
    known = TOWERS.get(name)
    if known is None:
        raise UserError(f"{where}: vision_encoder = {name!r} is not known; known: {', '.join(TOWERS)}")
    if not isinstance(drop, bool):
        raise UserError(f"{where}: drop_vision_last_layer = {shown(drop)}: expected true or false")
    if values["patch_size"] != known.patch_size:
        raise UserError(
            f"{where}: patch_size = {values['patch_size']} does not fit the vision tower {name!r}, which has "
            f"{known.patch_size}"
        )
    return dataclasses.replace(known, num_layers=known.num_layers - drop)


def _check_present(
    values: Mapping[str, Any], names: tuple[str, ...], where: str, optional: tuple[str, ...] = ()
) -> None:
    """Raises UserError where a field is absent that the published config.json files have."""
    for name in names:
        if values.get(name) is None and name not in optional:
            raise UserError(
                f"{where}: the field {name!r} is absent, and the result depends on it; write it as the published "
                "config.json has it"
            )


def _check_number(value: Any, where: str, *, whole: bool = False) -> None:
    """Raises UserError unless a value is a positive number, and a whole one where that is asked for."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9:
        raise UserError(f"{where} = {shown(value)}: expected a {'whole ' if whole else ''}number > 0")
