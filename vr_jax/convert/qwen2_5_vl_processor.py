"""The files beside the weights of a Qwen2.5-VL: its image processor, the ids of its tokens, and its chat template.

What preprocessor_config.json leaves out has the default of transformers' class. For the most pixels of an image that is
1,003,520; the released files say 12,845,056.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.chat_template import CHAT_TEMPLATES, find_template, same_prompts, unusable
from vr_jax.convert.folder import IMAGE_PROCESSOR_FILE, ForeignFolder
from vr_jax.convert.preprocessing import CLIP_MEAN, CLIP_STD, pixel_fields, read_pixel_fields
from vr_jax.convert.processor_export import TOKENIZER_FILE, write_generation, write_template
from vr_jax.convert.qwen2_5_vl import FRAMES, TOKENS, read_config
from vr_jax.convert.qwen2_5_vl_fields import IMAGE_PROCESSOR_FIELDS, PROCESSOR_FIELDS
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import shown
from vr_jax.model.config import Template, VlmConfig
from vr_jax.model_directory import is_there, token_ids
from vr_jax.storage import Path, write_json

_CLASS, _PROCESSOR_CLASS = "Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"
# The limits of the class, by the names of both forms that a file can have.
_LIMITS = {"shortest_edge": ("min_pixels", 56 * 56), "longest_edge": ("max_pixels", 28 * 28 * 1280)}


def read_qwen2_5_vl(folder: ForeignFolder, report: Callable[[str], None]) -> VlmConfig:
    """Reads the config of a Qwen2.5-VL with what its image processor says.

    Args:
        folder: The folder of transformers.
        report: Receives lines about what the folder leaves out.

    Raises:
        UserError: A file says what is not computed here, or the files do not fit one another.
    """
    config = read_config(folder.config.values, folder.config.where)
    if folder.processor is not None:
        PROCESSOR_FIELDS.check(folder.processor.values, folder.processor.where)
    _check_token_ids(folder)
    values, where = {}, f"{folder.directory} has no {IMAGE_PROCESSOR_FILE}"
    if folder.image_processor is not None:
        values, where = dict(folder.image_processor.values), folder.image_processor.where
    pixels = read_image_processor(values, config, where)
    absent = [name for edge, (name, _) in _LIMITS.items() if values.get(name) is None and edge not in _sizes(values)]
    if absent:
        stated = ", ".join(f"{name} = {pixels[name]}" for name in absent)
        report(f"{where}: the class of the image processor gives {stated}; the released files have other limits")
    image = dataclasses.replace(config.image, **pixels)
    return dataclasses.replace(config, image=image, template=_template(folder, report))


def _template(folder: ForeignFolder, report: Callable[[str], None]) -> Template:
    """The chat format that a folder is asked by: its own template where that writes other prompts and can be used."""
    found = find_template(folder.directory)
    if found is None or same_prompts(found[0], CHAT_TEMPLATES["qwen2_vl"]):
        return "qwen2_vl"
    reason = unusable(found[0], folder.directory)
    if reason is None:
        return "tokenizer"
    report(
        f"{found[1]}: the chat template writes other prompts than the format 'qwen2_vl', in which vr_jax asks; it is "
        f"kept for exports ({reason})"
    )
    return "qwen2_vl"


def read_image_processor(values: Mapping[str, Any], config: VlmConfig, where: str) -> dict[str, Any]:
    """Reads the settings of an image processor.

    Args:
        values: The content of preprocessor_config.json, or of `image_processor` in processor_config.json.
        config: The model that it has to fit.
        where: The file, for messages.

    Returns:
        The fields of `ImageConfig` that say how pixels come about.

    Raises:
        UserError: A field is not known, has a wrong value, or asks for what is not computed here.
    """
    IMAGE_PROCESSOR_FIELDS.check(values, where)
    found = str(values.get("image_processor_type") or _CLASS)
    if found.removesuffix("Fast").removesuffix("Pil") != _CLASS:
        raise UserError(f"{where}: image_processor_type = {found!r} is not supported, expected {_CLASS!r}")
    for name, ours in (("patch_size", config.encoder.patch_size), ("merge_size", config.projector.stride)):
        default = 14 if name == "patch_size" else 2
        stated = values.get(name)
        if (default if stated is None else stated) != ours:
            what = f"is absent, and its class takes {default}" if stated is None else f"= {shown(stated)}"
            raise UserError(f"{where}: {name} {what}, but the model's is {ours}; write the model's into the file")
    pixels = read_pixel_fields(values, CLIP_MEAN, CLIP_STD, where) | _limits(values, where)
    try:
        dataclasses.replace(config.image, **pixels)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    return pixels


def complete_export(directory: Path, config: VlmConfig, report: Callable[[str], None]) -> dict[str, int]:
    """Adds the image processor's file, the chat template and the settings of generation to an export.

    Args:
        directory: The folder, which holds the files of the tokenizer already, if there is one.
        config: The model.
        report: Receives lines about what is missing.

    Returns:
        The ids of the tokens that config.json names. Without a tokenizer they are those of the released one.

    Raises:
        UserError: The tokenizer cannot be read, or lacks one of the tokens.
    """
    write_json(directory / IMAGE_PROCESSOR_FILE, write_image_processor(config))
    path = directory / TOKENIZER_FILE
    if not path.exists():
        report(f"there is no {TOKENIZER_FILE} to export, so that AutoProcessor of transformers cannot be used")
        found = {name: number for name, (_, number) in TOKENS.items()}
        return found if config.image_token_id is None else found | {"image_token_id": config.image_token_id}
    ids = token_ids(path)
    absent = [token for token, _ in TOKENS.values() if token not in ids]
    if absent:
        raise UserError(f"{path} has no token {absent[0]!r}, which prompts of {_PROCESSOR_CLASS} need; add it")
    write_template(directory, config, report)
    write_generation(directory, config, report)
    return {name: ids[token] for name, (token, _) in TOKENS.items()}


def write_image_processor(config: VlmConfig) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model.

    The limits stand there in both forms, for old and new versions of transformers.
    """
    image = config.image
    limits = {name: getattr(image, name) for name, _ in _LIMITS.values()}
    return {
        "image_processor_type": _CLASS,
        "processor_class": _PROCESSOR_CLASS,
        **pixel_fields(image),
        **limits,
        "size": {edge: limits[name] for edge, (name, _) in _LIMITS.items()},
        "patch_size": config.encoder.patch_size,
        "merge_size": config.projector.stride,
        "temporal_patch_size": FRAMES,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }


def _sizes(values: Mapping[str, Any]) -> Mapping[str, Any]:
    size = values.get("size")
    return size if isinstance(size, Mapping) else {}


def _limits(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fewest and the most pixels; a field of its own comes before that of `size`, as in transformers."""
    size = values.get("size")
    if size is not None and not (isinstance(size, Mapping) and {*size} <= {*_LIMITS, "min_pixels", "max_pixels"}):
        raise UserError(f"{where}: size = {shown(size)}: expected the fields {' and '.join(_LIMITS)}, in pixels")
    found = {}
    for edge, (name, default) in _LIMITS.items():
        limit = values.get(name)
        if limit is None:
            limit = default if size is None else size.get(edge)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise UserError(f"{where}: {name} (or size.{edge}) = {shown(limit)}: expected a whole number of pixels")
        found[name] = limit
    return found


def _check_token_ids(folder: ForeignFolder) -> None:
    """Raises UserError if the tokenizer gives a token another id than config.json."""
    path = folder.directory / TOKENIZER_FILE
    if not is_there(path):
        return
    ids = token_ids(path)
    for name, (token, default) in TOKENS.items():
        if name == "video_token_id":
            continue
        expected = folder.config.values.get(name)
        expected = default if expected is None else expected
        if ids.get(token) != expected:
            found = f"gives {token!r} the id {ids[token]}" if token in ids else f"has no token {token!r}"
            raise UserError(
                f"{folder.config.where}: {name} = {shown(expected)}, but {path} {found}; set both to the same id"
            )
