"""Reads the settings of pixels, prompts and generation that stand beside config.json and the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.architectures import Source
from vr_jax.convert.chat_template import find_template, writes_chatml
from vr_jax.convert.folder import IMAGE_PROCESSOR_FILE, ForeignFolder
from vr_jax.convert.preprocessing import (
    NEXT_CLASS,
    ONEVISION_CLASS,
    SIGLIP_CLASS,
    check_processor,
    read_image_processor,
    write_pinpoints,
)
from vr_jax.errors import UserError
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model_directory import TOKENIZER_JSON_FILES, GenerationSettings, has_tokenizer, is_there, read_json

_TOKENIZER_FILE, _IMAGE = "tokenizer.json", "<image>"


def with_processor(config: VlmConfig, folder: ForeignFolder, report: Callable[[str], None]) -> VlmConfig:
    """Adds what a LLaVA-OneVision's or LLaVA-NeXT's processor says to the model's config.

    Args:
        config: The model, as config.json describes it.
        folder: Its folder.
        report: Receives a line where the folder says nothing about pixels.

    Raises:
        UserError: The processor does what is not computed here, or does not fit the model.
    """
    onevision = config.image.aspect_ratio == "anyres_max"
    image_token = _IMAGE
    if folder.processor is not None:
        aspect = {"vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}"} if onevision else {}
        place = {"num_image_tokens": config.cells_per_tile} if onevision else {}
        patch = getattr(config.encoder, "patch_size", None)
        expected = {**aspect, **place, "patch_size": patch, "vision_feature_select_strategy": "full"}
        check_processor(folder.processor.values, expected, folder.processor.where)
        image_token = str(folder.processor.values.get("image_token") or _IMAGE)
    _check_image_token(folder, image_token, config.image_token_id)
    template = find_template(folder.directory)
    if config.template == "qwen_1_5" and template is not None and not writes_chatml(template[0]):
        report(
            f"{template[1]}: the chat template writes other prompts than ChatML with LLaVA's system message; vr_jax "
            "asks in ChatML, and keeps the template for exports"
        )
    if folder.image_processor is None:
        report(_without_processor(folder))
        return config
    pixels = read_image_processor(
        folder.image_processor.values,
        ONEVISION_CLASS if onevision else NEXT_CLASS,
        config.image.tile_size,
        write_pinpoints(config.image),
        folder.image_processor.where,
    )
    return dataclasses.replace(config, image=dataclasses.replace(config.image, **pixels))


def encoder_pixels(folder: ForeignFolder, tile: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Returns the fields of `ImageConfig` that an encoder's folder says, and SigLIP's where it says nothing."""
    pixels: dict[str, Any] = {}
    if folder.image_processor is None:
        report(_without_processor(folder))
    else:
        where = folder.image_processor.where
        pixels = read_image_processor(folder.image_processor.values, SIGLIP_CLASS, tile, None, where)
    image = ImageConfig(tile_size=tile, aspect_ratio="square", **pixels)
    names = ("image_mean", "image_std", "rescale_factor", "resample")
    return {name: value for name, value in image.to_dict().items() if name in names}


def check_llava_pixels(folder: ForeignFolder, tile: int, report: Callable[[str], None]) -> None:
    """Checks that a folder asks for the pixels that LLaVA's own code makes, which reads no file for them.

    Raises:
        UserError: It asks for others.
    """
    if folder.image_processor is None:
        return
    where, default = folder.image_processor.where, ImageConfig(tile_size=tile, aspect_ratio="square")
    for name, value in encoder_pixels(folder, tile, report).items():
        expected = default.to_dict()[name]
        if value != expected:
            raise UserError(
                f"{where}: {name} = {value!r}, but LLaVA's own code takes {expected!r} for a SigLIP, whatever the file "
                f"says; leave it out with `--ignore={name}`"
            )


def generation_fields(part: Source, sections: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the fields of the generation_config.json of a model directory, or None where nothing is said.

    Args:
        part: The checkpoint that holds the decoder.
        sections: The sections of the model's config.

    Raises:
        UserError: The folder's file asks for what is not computed here.
    """
    file, size = part.folder.generation, sections["decoder"]["vocab_size"]
    if file is not None:
        settings = GenerationSettings.from_foreign(file.values, file.where)
        settings.check_vocabulary(size, file.where)
        return dict(file.values)
    # Without the file, transformers takes the ids that end a reply from config.json.
    for place in (part.config, part.config.section("text_config")):
        ids = place.values.get("eos_token_id")
        if ids is not None:
            fields = {"eos_token_id": ids}
            GenerationSettings.from_foreign(fields, place.where)
            return fields
    return None


def check_tokenizer(folder: ForeignFolder, report: Callable[[str], None]) -> None:
    """Reads the tokenizer's JSON files of a decoder's folder, and reports that there are none.

    Raises:
        UserError: One is no JSON object, e.g. since a download left a pointer in its place.
    """
    for name in TOKENIZER_JSON_FILES:
        if is_there(folder.directory / name):
            read_json(folder.directory / name)
    if not has_tokenizer(folder.directory):
        report(
            f"{folder.directory} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the language model "
            "into the result, or set config.tokenizer"
        )


def _without_processor(folder: ForeignFolder) -> str:
    return (
        f"{folder.directory} has no {IMAGE_PROCESSOR_FILE}: images are normalised as SigLIP's are, with mean and "
        "standard deviation 0.5"
    )


def _check_image_token(folder: ForeignFolder, token: str, expected: int | None) -> None:
    """Raises UserError if the tokenizer gives the image token another id than config.json."""
    path = folder.directory / _TOKENIZER_FILE
    if not path.exists():
        return
    added = read_json(path).get("added_tokens")
    for one in added if isinstance(added, list) else ():
        if isinstance(one, Mapping) and one.get("content") == token and one.get("id") != expected:
            raise UserError(
                f"{folder.config.where}: image_token_index = {expected}, but {path} gives {token!r} the id "
                f"{one.get('id')!r}; set both to the same id"
            )
