"""A vr_jax model directory -> a safetensors directory of Hugging Face's or LLaVA's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vr_jax.convert.architectures import HF_LLAVA, LLAVA, QWEN2, SIGLIP, Architecture
from vr_jax.convert.configs import (
    IMAGE_TOKEN,
    hf_llava_obstacle,
    write_hf_llava,
    write_llava,
    write_qwen2,
    write_siglip,
)
from vr_jax.convert.tables import slots
from vr_jax.convert.weights import write_safetensors
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model_directory import copy_side_files, load_params, read_sections
from vr_jax.storage import complete_directory

SHARD_BYTES = 5_000_000_000


def export_model(
    source: Path,
    target: Path,
    *,
    layout: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Writes `target`: model-0000k-of-0000n.safetensors of at most `max_shard_bytes` (or one tensor), their index,
    config.json and the tokenizer's files; complete or not at all.

    layout: "hf" (what transformers loads) or "llava" (everything, LLaVA-VR too); None: hf where there is one. Parts
    (an encoder, a decoder) are always in transformers' layout. Raises UserError, UserError, OSError."""
    sections = read_sections(source)
    architecture, config = _choose(sections, source, layout)
    params = load_params(source)
    places = slots(architecture.table(architecture.tables, sections), params)
    sizes = {
        name: int(np.prod(slot.shape)) * params[slot.paths[0]].dtype.itemsize for name, slot in sorted(places.items())
    }
    dtypes = {str(array.dtype) for array in params.values()}
    config["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    with complete_directory(target, size=sum(sizes.values()), overwrite=overwrite) as temporary:
        copy_side_files(source, temporary)
        host = {path: np.asarray(array) for path, array in params.items()}
        write_safetensors(temporary, sizes, lambda name: places[name].take(host), max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    report(f"{target}: {architecture.name}, {len(places)} tensors, {sum(sizes.values()) / 1e6:,.1f} MB")


def _choose(sections: Mapping[str, Any], source: Path, layout: str | None) -> tuple[Architecture, dict[str, Any]]:
    """The format and its config.json."""
    parts = {name: value for name, value in sections.items() if value is not None}
    if set(parts) in ({"encoder"}, {"decoder"}):
        if layout == "llava":
            raise UserError(f"{source} holds only {next(iter(parts))}: layout 'llava' needs a whole model")
        if "encoder" in parts:
            return SIGLIP, write_siglip(SiglipConfig.from_dict(parts["encoder"]))
        return QWEN2, write_qwen2(Qwen2Config.from_dict(parts["decoder"]))
    if "image" not in parts:
        raise UserError(f"{source} holds parts of a model ({', '.join(sorted(parts))}); there is no format for that")
    config = VlmConfig.from_dict(dict(sections))
    obstacle = hf_llava_obstacle(config)
    if layout == "hf" and obstacle:
        raise UserError(f"{source}: transformers has no model with {obstacle}; use --layout llava")
    if layout == "llava" or obstacle:
        return LLAVA, write_llava(config)
    return HF_LLAVA, write_hf_llava(config, _image_token(source))


def _image_token(directory: Path) -> int:
    """The id of `<image>` in the directory's tokenizer; OneVision's where it has none."""
    path = directory / "tokenizer.json"
    if path.is_file():
        for token in json.loads(path.read_text()).get("added_tokens", []):
            if token["content"] == "<image>":
                return int(token["id"])
    return IMAGE_TOKEN
