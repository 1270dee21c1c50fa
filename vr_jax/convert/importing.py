"""Reads checkpoints of foreign formats and writes a model directory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.convert.architectures import Source, section_of
from vr_jax.convert.chat_template import find_template
from vr_jax.convert.folder_settings import check_tokenizer, generation_fields
from vr_jax.convert.formats import Architecture
from vr_jax.convert.source_sections import Sections, open_sources, sections_of
from vr_jax.convert.tables import Slot, slots
from vr_jax.convert.weights import DTYPES
from vr_jax.errors import UserError, message_list
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.projectors.resampler import ResamplerConfig
from vr_jax.model.registry import DecoderConfig, EncoderConfig, Layout
from vr_jax.model.vlm import abstract_model
from vr_jax.model_directory import save_params
from vr_jax.storage import PathLike, as_path, check_target

# A mode of images for each layout of an encoder that stands without a model.
_MODE_OF: dict[Layout, Literal["square", "native", "slices"]] = {
    "square": "square",
    "windows": "native",
    "raster": "slices",
}
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
    change: Callable[[dict[str, np.ndarray], Sections], None] = lambda params, sections: None,
) -> None:
    """Writes a model directory of a checkpoint, or of an encoder and a decoder.

    The folder is read as one thing (`vr_jax.convert.folder`): what its files say is part of the result, or is known to
    have no meaning here, or stops the import.

    The host needs memory for the result, for the largest tensor (of a pickle: for the largest file), and 0.4 GB while
    Orbax writes.

    Args:
        source: A checkpoint of any known format, or None.
        target: The model directory, which appears only when it is complete.
        encoder: The directory of an encoder, or of a whole model, whose encoder is taken. It gives what a `source` in
            LLaVA's layout lacks; without a source the result holds only the encoder, and the decoder if that is given.
        decoder: The directory of a decoder, in the same way.
        dtype: Type of the stored parameters, "float32" or "bfloat16"; None keeps that of each tensor.
        ignore: Names of fields and files of the folders that are left out of consideration.
        overwrite: Whether an existing directory is replaced.
        report: Receives lines about what was imported and what was left out.
        change: Changes the arrays, which it is given by merged path with the sections of the result, before they are
            written.

    Raises:
        UserError: A checkpoint is damaged or of an unknown format, or one of its files says what is not computed here,
            or tensors do not fit (the message lists them all), or the target cannot be written.
    """
    target = as_path(target)
    check_target(target, overwrite=overwrite)
    sections, providers, generation, plans, shapes = _planned(open_sources(source, encoder, decoder, ignore), report)
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
    change(params, sections)
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
    return _planned(open_sources(source, encoder, decoder, ignore), report)[0]


def _planned(sources: Mapping[str, Source], report: Callable[[str], None]) -> tuple[Any, ...]:
    """Sections, their providers, generation settings, the place of every tensor, and the shapes of the parameters."""
    sections, providers = sections_of(sources, report)
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
            projector=ResamplerConfig(queries=1) if encoder.layout == "raster" else MlpConfig(),
            image=ImageConfig(
                tile_size=encoder.image_size,
                aspect_ratio=_MODE_OF[encoder.layout],
                unpad=False,
                slice_size=encoder.image_size,
            ),
            vision_feature_layer=encoder.num_layers,
        )
    staged = flatten_params(abstract_model(config))
    merged = jax.eval_shape(merge_stages, staged)
    return {path: leaf for path, leaf in sorted(merged.items()) if sections.get(section_of(path)) is not None}


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
        title = f"{where}: tensors that do not fit config.json: {len(problems)}; take both from one checkpoint"
        raise UserError(message_list(title, problems, _MAX_LISTED))
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
