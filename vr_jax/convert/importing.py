"""Reads checkpoints of foreign formats and writes a model directory."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.convert.architectures import Source, section_of
from vr_jax.convert.chat_template import find_template, named_template
from vr_jax.convert.configs import read_hf_llava, read_llava
from vr_jax.convert.decoder_configs import read_decoder
from vr_jax.convert.encoder_configs import read_encoder
from vr_jax.convert.folder import read_folder
from vr_jax.convert.folder_settings import (
    check_token_ids,
    check_tokenizer,
    encoder_pixels,
    generation_fields,
    with_llava_pixels,
    with_processor,
)
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
from vr_jax.convert.minicpm_v import marker_ids, read_minicpm, read_minicpm_v, with_slices
from vr_jax.convert.qwen2_5_vl import read_vr_config
from vr_jax.convert.qwen2_5_vl_processor import read_qwen2_5_vl
from vr_jax.convert.tables import Slot, slots
from vr_jax.convert.weights import DTYPES
from vr_jax.errors import UserError, message_list
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.registry import DecoderConfig, EncoderConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.model_directory import PIXELS, save_params
from vr_jax.storage import PathLike, as_path, check_target

Sections = dict[str, Any]
_PARTS = ("encoder", "decoder")
_COMPUTED_NEAR = {"F32": 1e-5, "F16": 1e-3, "BF16": 2**-8}  # how far rounding takes values up to 1
_MAX_LISTED = 1000  # tensors that do not fit; a whole checkpoint of another model has hundreds
_CHUNK = 1 << 24  # values that are looked at together

logger = logging.getLogger("vr_jax.convert")


def import_checkpoint(
    source: PathLike | None,
    target: PathLike,
    *,
    encoder: PathLike | None = None,
    decoder: PathLike | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Writes a model directory of a checkpoint, or of an encoder and a decoder.

    The folder is read as one thing (`vr_jax.convert.folder`): what its files say is part of the result, or is known to
    have no meaning here, or stops the import.

    The host needs memory for the result, for the largest tensor (of a pickle: for the largest file), and 0.4 GB while
    Orbax writes.

    Args:
        source: A checkpoint of any known format, or None.
        target: The model directory, which appears only when it is complete.
        encoder: The directory of an encoder. It gives what a `source` in LLaVA's layout lacks; without a source the
            result holds only the encoder, and the decoder if that is given.
        decoder: The directory of a decoder, in the same way.
        dtype: Type of the stored parameters, "float32" or "bfloat16"; None keeps that of each tensor.
        ignore: Names of fields and files of the folders that are left out of consideration.
        overwrite: Whether an existing directory is replaced.
        report: Receives lines about what was imported and what was left out.

    Raises:
        UserError: A checkpoint is damaged or of an unknown format, or one of its files says what is not computed here,
            or tensors do not fit (the message lists them all), or the target cannot be written.
    """
    target = as_path(target)
    check_target(target, overwrite=overwrite)
    sections, providers, generation, plans, shapes = _planned(_open(source, encoder, decoder, ignore), report)
    params = _allocate(shapes, plans, dtype)
    if "image" in sections and {array.dtype.name for array in params.values()} == {"bfloat16"}:
        sections["dtype"] = "bfloat16"  # a model of this type computes in it, as in transformers 5
    broken: list[str] = []
    for part, _ in plans:
        _check_computed(part, sections)
    for part, places in plans:
        names = {part.originals[name]: slot for name, slot in places.items()}
        for original, tensor in part.checkpoint.read(names):
            if not _is_finite(tensor):
                broken.append(f"{part.checkpoint.tensors[original].file}: {original}")
            names[original].place(tensor, params)
    if broken:
        raise UserError(
            message_list(
                "these tensors hold NaN or infinite values; get the files again, or another checkpoint:", broken
            )
        )
    device = jax.local_devices(backend="cpu")[0]
    # The memory is aligned, so that JAX takes the arrays as its own buffers without copying them.
    arrays = {path: jax.device_put(params.pop(path), device) for path in list(params)}
    # An encoder brings no tokenizer: that of its folder belongs to its text tower.
    tokenizer = providers["decoder"].directory if "decoder" in providers else None
    types = Counter(str(array.dtype) for array in arrays.values())
    found = find_template(tokenizer) if tokenizer is not None and sections.get("template") == "tokenizer" else None
    template = None if found is None else found[0]
    save_params(target, sections, arrays, tokenizer, generation=generation, chat_template=template, overwrite=overwrite)
    for part, _ in plans:
        report(f"{part.directory}: {part.architecture.name}, {len(part.originals)} tensors imported")
        if part.unwrapped:
            report(f"  the names of {part.unwrapped} tensors had the prefix of a wrapper, which was taken off")
        for reason, count in part.ignored.items():
            report(f"  ignored on purpose: {count} tensors ({reason})")
    count, size = sum(a.size for a in arrays.values()), sum(a.nbytes for a in arrays.values())
    owners = sorted({section_of(path) for path in arrays})
    stored = ", ".join(f"{number} arrays in {name}" for name, number in sorted(types.items()))
    report(f"{target}: {count:,} parameters of {', '.join(owners)}; {size / 1e6:,.1f} MB; {stored}")


def plan_import(
    source: PathLike | None,
    *,
    encoder: PathLike | None = None,
    decoder: PathLike | None = None,
    ignore: Sequence[str] = (),
    report: Callable[[str], None] = logger.info,
) -> Sections:
    """Does all checks of `import_checkpoint` that need no tensor, and returns the sections of the result.

    Raises:
        UserError: As `import_checkpoint`.
    """
    return _planned(_open(source, encoder, decoder, ignore), report)[0]


def _planned(sources: Mapping[str, Source], report: Callable[[str], None]) -> tuple[Any, ...]:
    """Sections, their providers, generation settings, the place of every tensor, and the shapes of the parameters."""
    sections, providers = _sections(sources, report)
    generation = generation_fields(providers["decoder"], sections) if "decoder" in sections else None
    if "decoder" in sections:
        check_tokenizer(providers["decoder"].folder, report)
        _resolve_tie(sections, providers["decoder"], report)
    shapes = abstract_params(sections)
    if "image" in sections and not sections["image"]["unpad"] and not _has_newline(providers["projector"]):
        del shapes["image_newline"]  # a model without unpad has none
    plans = _plan(shapes, providers, sections)
    return sections, providers, generation, plans, shapes


def _is_finite(tensor: np.ndarray) -> bool:
    """Returns whether every value is finite. A part at a time is looked at, which keeps the memory small."""
    values = tensor.reshape(-1)
    return all(np.isfinite(values[i : i + _CHUNK]).all() for i in range(0, values.size, _CHUNK))


def abstract_params(sections: Sections) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter that some sections own, by merged path.

    Args:
        sections: Those of a whole `VlmConfig`, or those of an encoder, a decoder or both.
    """
    if "image" in sections:
        config = VlmConfig.from_dict(sections)
    else:
        encoder = EncoderConfig.from_dict(sections["encoder"]) if "encoder" in sections else SiglipConfig()
        decoder = DecoderConfig.from_dict(sections["decoder"]) if "decoder" in sections else TransformerConfig()
        config = VlmConfig(
            encoder=encoder,
            decoder=decoder,
            projector=MlpConfig(),
            image=single_tile(encoder.image_size),
            vision_feature_layer=encoder.num_layers,
        )
    staged = flatten_params(abstract_model(config))
    merged = jax.eval_shape(merge_stages, staged)
    return {path: leaf for path, leaf in sorted(merged.items()) if sections.get(section_of(path)) is not None}


def _open(
    source: PathLike | None, encoder: PathLike | None, decoder: PathLike | None, ignore: Sequence[str]
) -> dict[str, Source]:
    """Opens the checkpoints that are given, by their roles ("main", "encoder", "decoder")."""
    paths = {"main": source, "encoder": encoder, "decoder": decoder}
    sources = {role: Source(read_folder(as_path(path), ignore)) for role, path in paths.items() if path is not None}
    if not sources:
        raise UserError("nothing to import: give --from, or --encoder and --decoder")
    absent = [name for name in ignore if not any(name in one.folder.ignored for one in sources.values())]
    if absent:
        folders = ", ".join(str(one.directory) for one in sources.values())
        raise UserError(f"--ignore={absent[0]}: no file of {folders} has this field or name; leave the flag out")
    for role in _PARTS:
        if role in sources and sources[role].architecture.holds != role:
            found, known = sources[role], [one.name for one in ARCHITECTURES if one.holds == role]
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


def _sections(sources: Mapping[str, Source], report: Callable[[str], None]) -> tuple[Sections, dict[str, Source]]:
    """The sections of the result, and the checkpoint that provides the parameters of each section."""
    main = sources.get("main")
    if main is None or main.architecture.holds in _PARTS:
        parts: dict[str, Source] = dict(sources) if main is None else {main.architecture.holds: main}
        return _part_sections(parts, report), parts
    providers = dict.fromkeys(main.architecture.sections, main)
    if main.architecture is HF_LLAVA:
        config = read_hf_llava(main.config.values, main.config.where)
        return with_processor(config, main.folder, report).to_dict(), providers
    if main.architecture is QWEN2_5_VL:
        return read_qwen2_5_vl(main.folder, report).to_dict(), providers
    if main.architecture is VR_QWEN2_5_VL:
        return read_vr_config(main.config.values, main.config.where).to_dict(), providers
    if main.architecture is MINICPM_V:
        config = with_slices(read_minicpm_v(main.config.values, main.config.where), main.folder, report)
        check_token_ids(main.folder, marker_ids(main.config.values))
        return config.to_dict(), providers
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
    given = {role: _read_part(role, sources[role]) for role in _PARTS if role in sources}
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
        config = dataclasses.replace(config, template=named_template(main.decoder_family, tokenizer, size))
    return config.to_dict(), providers


def _part_sections(parts: Mapping[str, Source], report: Callable[[str], None]) -> Sections:
    """The sections of an encoder, a decoder or both."""
    configs = {role: _read_part(role, part) for role, part in parts.items()}
    found: Sections = {role: config.to_dict() for role, config in configs.items()}
    if "encoder" in parts:
        part = parts["encoder"]
        assert part.architecture.encoder is not None
        found[PIXELS] = encoder_pixels(part.folder, part.architecture.encoder, configs["encoder"].image_size, report)
    return found


def _read_part(role: str, part: Source) -> Any:
    """The config of an encoder or a decoder alone."""
    architecture = part.architecture
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


def _check_computed(part: Source, sections: Sections) -> None:
    """Raises UserError where a stored tensor differs from what our model computes in its place."""
    names = {original: name for name, original in part.computed.items()}
    for original, tensor in part.checkpoint.read(names):
        expected = part.architecture.computed[names[original]](sections)
        stored = part.checkpoint.tensors[original]
        if tensor.shape != expected.shape:
            raise UserError(f"{stored.file}: {original} has the shape {tensor.shape}, expected {expected.shape}")
        difference = float(np.abs(tensor.astype(np.float32) - expected).max(initial=0))
        if not difference <= _COMPUTED_NEAR.get(stored.dtype, 0):
            raise UserError(
                f"{stored.file}: {original} differs by {difference:.2g} from the constants that are computed in its "
                "place; a model that was trained with other ones is not supported"
            )


def _head_and_embedding(architecture: Architecture) -> tuple[str, str]:
    """The foreign names of the output matrix and of the embedding."""
    names = {rule.ours[0]: rule.theirs for rule in architecture.tables["decoder"]}
    return names["decoder.lm_head.kernel"], names["decoder.embed.embedding"]


def _resolve_tie(sections: Sections, part: Source, report: Callable[[str], None]) -> None:
    """Leaves out an output matrix that copies the tied embedding.

    Where the two differ, transformers does not tie them whatever config.json says, and neither does the result.
    """
    head, embedding = _head_and_embedding(part.architecture)
    if not sections["decoder"]["tie_word_embeddings"] or not {head, embedding} <= set(part.originals):
        return
    originals = [part.originals[head], part.originals[embedding]]
    (_, first), (_, second) = part.checkpoint.read(dict.fromkeys(originals))
    if np.array_equal(first, second):
        del part.originals[head]
        part.ignored["lm_head, a copy of the tied embedding"] += 1
    else:
        sections["decoder"]["tie_word_embeddings"] = False
        report(f"{part.directory}: lm_head differs from the embedding, so they are not tied as config.json says")


def _has_newline(part: Source) -> bool:
    """Returns whether a checkpoint holds the newline vector."""
    rules = part.architecture.every_rule("projector")
    return any(rule.theirs in part.originals for rule in rules if rule.ours == ("image_newline",))


def _plan(
    shapes: Mapping[str, Any], providers: Mapping[str, Source], sections: Sections
) -> list[tuple[Source, dict[str, Slot]]]:
    """The place of every tensor of every checkpoint; the error lists all tensors that do not fit."""
    plans, problems = [], []
    for part in dict.fromkeys(providers.values()):
        mine = [section for section, provider in providers.items() if provider is part]
        owned = {path: shape for path, shape in shapes.items() if section_of(path) in mine}
        expected = slots(part.architecture.table(mine, sections), owned)
        for name, slot in expected.items():
            if name not in part.originals:
                problems.append(f"missing     {name}: expected {slot.shape}")
                continue
            tensor, original = part.tensor(name), part.originals[name]
            if tensor.shape != slot.shape:
                problems.append(f"mis-shaped  {original}: found {tensor.shape}, expected {slot.shape}")
            if tensor.dtype not in DTYPES:
                problems.append(f"mis-typed   {original}: found {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        problems += [
            f"unexpected  {original}: found {part.tensor(name).shape} in {part.tensor(name).file.name}"
            for name, original in part.originals.items()
            if name not in expected
        ]
        plans.append((part, expected))
    if problems:
        where = ", ".join(str(part.directory) for part, _ in plans)
        raise UserError(
            message_list(f"{where}: tensors that do not fit config.json: {len(problems)}", problems, _MAX_LISTED)
        )
    return plans


def _allocate(
    shapes: Mapping[str, Any], plans: list[tuple[Source, dict[str, Slot]]], dtype: str | None
) -> dict[str, np.ndarray]:
    """Arrays for all parameters; one that is stacked of tensors of several types has the widest of them."""
    stored: dict[str, Any] = {}
    for part, places in plans:
        for name, slot in places.items():
            found = DTYPES[part.tensor(name).dtype]
            for path in slot.paths:
                stored[path] = jnp.promote_types(stored.get(path, found), found)
    return {path: _aligned(leaf.shape, jnp.dtype(dtype or stored[path])) for path, leaf in shapes.items()}


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a boundary of 64 bytes, which JAX takes as a buffer without copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
