"""Reads the settings of pixels, prompts and generation that stand beside config.json and the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.architectures import Source
from vr_jax.convert.chat_template import find_template, named_template, tell_doubt, unusable, writes_chatml
from vr_jax.convert.configs import NEXT, ONEVISION, class_of
from vr_jax.convert.decoder_configs import DecoderFamily, decoder_family, default_ends
from vr_jax.convert.encoder_configs import CLIP_FAMILY, EncoderFamily, encoder_family
from vr_jax.convert.folder import IMAGE_PROCESSOR_FILE, ForeignFolder
from vr_jax.convert.preprocessing import (
    CLIP_CLASS,
    LLAVA_CLASS,
    NEXT_CLASS,
    ONEVISION_CLASS,
    SIGLIP_CLASS,
    ProcessorClass,
    check_processor,
    read_image_processor,
    write_pinpoints,
)
from vr_jax.errors import UserError
from vr_jax.model.config import ImageConfig, Template, VlmConfig
from vr_jax.model_directory import (
    TOKENIZER_JSON_FILES,
    GenerationSettings,
    has_tokenizer,
    is_there,
    read_json,
    token_ids,
)

_TOKENIZER_FILE, _IMAGE = "tokenizer.json", "<image>"
_SENTENCEPIECE, _READ = "tokenizer.model", (_TOKENIZER_FILE, "vocab.json")
PIXEL_FIELDS = ("image_mean", "image_std", "rescale_factor", "resample")


def with_processor(config: VlmConfig, folder: ForeignFolder, report: Callable[[str], None]) -> VlmConfig:
    """Adds what the processor of a LLaVA of transformers says to the model's config.

    Args:
        config: The model, as config.json describes it.
        folder: Its folder.
        report: Receives a line where the folder says nothing about pixels.

    Raises:
        UserError: The processor does what is not computed here, or does not fit the model.
    """
    kind, family = class_of(config), encoder_family(config.encoder)
    image_token = _IMAGE
    if folder.processor is not None:
        aspect = {"vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}"} if kind is ONEVISION else {}
        place = {"num_image_tokens": config.cells_per_tile} if kind is ONEVISION else {}
        expected = {
            **aspect,
            **place,
            "patch_size": config.encoder.patch_size,
            "vision_feature_select_strategy": family.select,
            "num_additional_image_tokens": family.extra_tokens,
        }
        check_processor(folder.processor.values, expected, folder.processor.where)
        image_token = str(folder.processor.values.get("image_token") or _IMAGE)
    _check_image_token(folder, image_token, config.image_token_id)
    text = decoder_family(config.decoder)
    config = dataclasses.replace(config, template=_template(folder, text, config, report))
    if folder.image_processor is None:
        report(_without_processor(folder, family))
        return config
    classes: tuple[ProcessorClass, ...] = (LLAVA_CLASS, CLIP_CLASS, SIGLIP_CLASS)
    if kind is ONEVISION or kind is NEXT:
        classes = (ONEVISION_CLASS if kind is ONEVISION else NEXT_CLASS,)
    pixels = read_image_processor(
        folder.image_processor.values,
        classes,
        config.image.tile_size,
        write_pinpoints(config.image),
        folder.image_processor.where,
    )
    return dataclasses.replace(config, image=dataclasses.replace(config.image, **pixels))


def _template(
    folder: ForeignFolder, family: DecoderFamily, config: VlmConfig, report: Callable[[str], None]
) -> Template:
    """The chat format that a LLaVA of transformers is asked by: its folder's own where that can be used."""
    named = named_template(family, folder.directory, config.decoder.vocab_size)
    found = find_template(folder.directory)
    if found is None:
        tell_doubt(named, folder.directory, report)
        return named
    if named == "qwen_1_5" and writes_chatml(found[0]):
        return named
    reason = "a LLaVA-OneVision was trained with LLaVA's system message, which templates of its folders leave out"
    if class_of(config) is not ONEVISION:
        unused = unusable(found[0], folder.directory)
        if unused is None:
            return "tokenizer"
        reason = unused
    report(
        f"{found[1]}: the chat template writes other prompts than the format {named!r}, in which vr_jax asks; it is "
        f"kept for exports ({reason})"
    )
    return named


def encoder_pixels(
    folder: ForeignFolder, family: EncoderFamily, tile: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the fields of `ImageConfig` that an encoder's folder says, or those of its family.

    Args:
        folder: The folder.
        family: The family of the encoder.
        tile: The side of its images in pixels.
        report: Receives a line where the folder says nothing.

    Raises:
        UserError: The folder says what is not computed here.
    """
    pixels: dict[str, Any] = dict(family.pixels)
    if folder.image_processor is None:
        report(_without_processor(folder, family))
    else:
        where = folder.image_processor.where
        pixels = read_image_processor(folder.image_processor.values, (family.processor,), tile, None, where)
    image = ImageConfig(tile_size=tile, **{**pixels, "aspect_ratio": "square"})
    return {name: value for name, value in image.to_dict().items() if name in PIXEL_FIELDS}


def with_llava_pixels(
    config: VlmConfig, main: ForeignFolder, encoder: ForeignFolder | None, report: Callable[[str], None]
) -> VlmConfig:
    """Adds the pixels that LLaVA's own code makes to a model's config.

    LLaVA reads no file for a SigLIP, and for a CLIP that of the encoder's folder.

    Args:
        config: The model.
        main: Its folder.
        encoder: The folder of its encoder where that is given.
        report: Receives lines about what is not said.

    Raises:
        UserError: A file that LLaVA does not read asks for other pixels.
    """
    family, tile = encoder_family(config.encoder), config.image.tile_size
    reads = family is CLIP_FAMILY
    if reads and encoder is not None:
        pixels = encoder_pixels(encoder, family, tile, report)
        config = dataclasses.replace(config, image=ImageConfig.from_dict({**config.image.to_dict(), **pixels}))
    for folder in (main, encoder):
        if folder is None or folder.image_processor is None or (reads and folder is encoder):
            continue
        where, expected = folder.image_processor.where, config.image.to_dict()
        for name, value in encoder_pixels(folder, family, tile, report).items():
            if value != expected[name]:
                raise UserError(
                    f"{where}: {name} = {value!r}, but LLaVA's own code takes {expected[name]!r} for a {family.name}, "
                    f"whatever the file says; leave it out with `--ignore={name}`"
                )
    return config


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
    # Without the file, transformers takes the ids that end a reply from config.json, or those of the decoder's class.
    places = (part.config, part.config.section("text_config"))
    for place in places:
        ids = place.values.get("eos_token_id")
        if ids is not None:
            fields = {"eos_token_id": ids}
            GenerationSettings.from_foreign(fields, place.where)
            return fields
    inner = places[1] if "text_config" in part.config.values else places[0]
    ids = None if "eos_token_id" in inner.values else default_ends(_text_config(part))
    return None if ids is None else {"eos_token_id": ids}


def _text_config(part: Source) -> str:
    """The config class that transformers has for the decoder of a checkpoint."""
    return part.architecture.text_config or part.decoder_family.hf_config


def check_tokenizer(folder: ForeignFolder, report: Callable[[str], None]) -> None:
    """Reads the tokenizer's JSON files of a decoder's folder, and reports where there are none to load it from.

    Raises:
        UserError: One is no JSON object, e.g. since a download left a pointer in its place.
    """
    for name in TOKENIZER_JSON_FILES:
        if is_there(folder.directory / name):
            read_json(folder.directory / name)
    if is_there(folder.directory / _SENTENCEPIECE) and not any(is_there(folder.directory / name) for name in _READ):
        report(
            f"{folder.directory} has its tokenizer as {_SENTENCEPIECE} alone, which is not read; with the package "
            f"sentencepiece, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes "
            f"{_TOKENIZER_FILE} there: do that and import again"
        )
    elif not has_tokenizer(folder.directory):
        report(
            f"{folder.directory} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the language model "
            "into the result, or set config.tokenizer"
        )


def check_token_ids(folder: ForeignFolder, ids: Mapping[str, int]) -> None:
    """Checks that the tokenizer gives tokens the ids that config.json gives them.

    Args:
        folder: The folder of the checkpoint.
        ids: The ids in config.json, by the text of the token.

    Raises:
        UserError: The tokenizer gives one another id.
    """
    path = folder.directory / _TOKENIZER_FILE
    found = token_ids(path) if ids and path.exists() else {}
    for text, expected in ids.items():
        if found.get(text, expected) != expected:
            raise UserError(
                f"{folder.config.where}: the token {text!r} has the id {expected!r}, but {path} gives it the id "
                f"{found[text]!r}; set both to the same id"
            )


def _without_processor(folder: ForeignFolder, family: EncoderFamily) -> str:
    return (
        f"{folder.directory} has no {IMAGE_PROCESSOR_FILE}: images are normalised as {family.name}'s are, with the "
        f"mean {family.processor.image_mean} and the standard deviation {family.processor.image_std}"
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
