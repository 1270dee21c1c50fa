"""Finds the sections of an imported model, and the checkpoint that provides each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vr_jax.convert.architectures import Source
from vr_jax.convert.chat_template import named_template, tell_doubt
from vr_jax.convert.configs import read_hf_llava, read_llava
from vr_jax.convert.decoder_configs import read_decoder
from vr_jax.convert.encoder_configs import read_encoder
from vr_jax.convert.folder import read_folder
from vr_jax.convert.folder_settings import (
    PIXEL_FIELDS,
    check_token_ids,
    encoder_pixels,
    with_llava_pixels,
    with_processor,
)
from vr_jax.convert.formats import ARCHITECTURES, LLAVA, MINICPM, MINICPM_V, QWEN2_5_VL, VR_QWEN2_5_VL
from vr_jax.convert.minicpm_v import marker_ids, read_minicpm, read_minicpm_v, with_slices
from vr_jax.convert.qwen2_5_vl import read_vr_config
from vr_jax.convert.qwen2_5_vl_processor import read_qwen2_5_vl
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import PIXELS
from vr_jax.storage import PathLike, as_path

Sections = dict[str, Any]
_PARTS = ("encoder", "decoder")


def open_sources(
    source: PathLike | None, encoder: PathLike | None, decoder: PathLike | None, ignore: Sequence[str]
) -> dict[str, Source]:
    """Opens the checkpoints that are given.

    Args:
        source: A checkpoint of any known format, or None.
        encoder: The directory of an encoder, or of a whole model, whose encoder is taken.
        decoder: The directory of a decoder, or of a whole model, whose decoder is taken.
        ignore: Names of fields and files of the folders that are left out of consideration.

    Returns:
        The checkpoints by their roles ("main", "encoder", "decoder").

    Raises:
        UserError: Nothing is given, a folder cannot be read, or a checkpoint does not fit its role.
    """
    paths = {"main": source, "encoder": encoder, "decoder": decoder}
    sources = {role: Source(read_folder(as_path(path), ignore)) for role, path in paths.items() if path is not None}
    if not sources:
        raise UserError("nothing to import: give --from, or --encoder and --decoder")
    absent = [name for name in ignore if not any(name in one.folder.ignored for one in sources.values())]
    if absent:
        folders = ", ".join(str(one.directory) for one in sources.values())
        raise UserError(f"--ignore={absent[0]}: no file of {folders} has this field or name; leave the flag out")
    for role in _PARTS:
        if role not in sources:
            continue
        found = sources[role]
        if found.architecture.holds == "model" and found.architecture is not LLAVA:
            found.restrict(role)
        elif found.architecture.holds != role:
            known = [one.name for one in ARCHITECTURES if one.holds in (role, "model") and one is not LLAVA]
            raise UserError(
                f"--{role} {found.directory} is {found.architecture.name}, expected one of {', '.join(known)}"
            )
    main = sources.get("main")
    if main is not None and len(sources) > 1 and main.architecture is not LLAVA:
        raise UserError(
            f"--from {main.directory} is {main.architecture.name}: --encoder and --decoder only complete a directory "
            "in LLaVA's own layout, or stand alone"
        )
    return sources


def sections_of(sources: Mapping[str, Source], report: Callable[[str], None]) -> tuple[Sections, dict[str, Source]]:
    """Reads the config of the result.

    Args:
        sources: The checkpoints by their roles.
        report: Receives lines about what the folders do not say.

    Returns:
        The sections of the result, and the checkpoint that provides the parameters of each section.

    Raises:
        UserError: A part is missing or given twice, or a folder says what is not computed here.
    """
    main = sources.get("main")
    if main is None or main.architecture.holds in _PARTS:
        parts: dict[str, Source] = dict(sources) if main is None else {main.architecture.holds: main}
        return _part_sections(parts, report), parts
    providers = dict.fromkeys(main.architecture.sections, main)
    if main.architecture is not LLAVA:
        return _whole(main, report).to_dict(), providers
    for role in _PARTS:
        if not main.holds(role):
            if role not in sources:
                raise UserError(
                    f"{main.directory} holds no {role}; give that it was trained with: --{role} DIR{_named(main, role)}"
                )
            providers[role] = sources[role]
        elif role in sources and role == "decoder":
            raise UserError(f"{main.directory} already holds a decoder; leave --decoder out")
    # An encoder that is in `main`, and that its config.json does not describe, is described by --encoder.
    given = {role: _read_part(role, sources[role], report) for role in _PARTS if role in sources}
    config = read_llava(
        main.config.values,
        main.config.where,
        own_layers=main.count_layers("encoder"),
        encoder=given.get("encoder"),
        decoder=given.get("decoder"),
        text=main.decoder_family,
    )
    if "vr_jax" not in main.config.values:
        encoder = sources["encoder"].folder if "encoder" in sources else None
        config = with_llava_pixels(config, main.folder, encoder, report)
        tokenizer, size = providers["decoder"].directory, config.decoder.vocab_size
        named = named_template(main.decoder_family, tokenizer, size)
        tell_doubt(named, tokenizer, report)
        config = dataclasses.replace(config, template=named)
    return config.to_dict(), providers


def _part_sections(parts: Mapping[str, Source], report: Callable[[str], None]) -> Sections:
    """The sections of an encoder, a decoder or both."""
    configs = {role: _read_part(role, part, report) for role, part in parts.items()}
    found: Sections = {role: config.to_dict() for role, config in configs.items()}
    if "encoder" in parts:
        part = parts["encoder"]
        if part.architecture.encoder is None:
            image = _whole(part, report).image.to_dict()
            found[PIXELS] = {name: image[name] for name in PIXEL_FIELDS}
        else:
            tile = configs["encoder"].image_size
            found[PIXELS] = encoder_pixels(part.folder, part.architecture.encoder, tile, report)
    return found


def _whole(part: Source, report: Callable[[str], None]) -> VlmConfig:
    """The config of a whole model in any format but LLaVA's own."""
    values, where = part.config.values, part.config.where
    if part.architecture is QWEN2_5_VL:
        return read_qwen2_5_vl(part.folder, report)
    if part.architecture is VR_QWEN2_5_VL:
        return read_vr_config(values, where)
    if part.architecture is MINICPM_V:
        config = with_slices(read_minicpm_v(values, where), part.folder, report)
        check_token_ids(part.folder, marker_ids(values))
        return config
    return with_processor(read_hf_llava(values, where), part.folder, report)


def _read_part(role: str, part: Source, report: Callable[[str], None]) -> Any:
    """The config of an encoder or a decoder alone, or of that of a whole model."""
    architecture = part.architecture
    if architecture.holds == "model":
        return getattr(_whole(part, report), role)
    if role == "encoder":
        assert architecture.encoder is not None
        return read_encoder(architecture.encoder, part.config.values, part.config.where)
    if architecture is MINICPM:
        return read_minicpm(part.config.values, part.config.where)
    assert architecture.decoder is not None
    return read_decoder(architecture.decoder, part.config.values, part.config.where)


def _named(main: Source, role: str) -> str:
    """What the config.json of a LLaVA calls a part that the folder does not hold."""
    name = main.config.values.get("mm_vision_tower" if role == "encoder" else "_name_or_path")
    return f" ({main.config.where} names {name})" if isinstance(name, str) and name else ""
