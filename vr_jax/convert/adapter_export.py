"""Writes the adapter of a run in the form of PEFT, to be loaded onto the exported base (docs/convert.md#adapters)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vr_jax import distributed
from vr_jax.convert.adapter_fields import ADAPTER_CONFIG
from vr_jax.convert.adapters import ADAPTER_WEIGHTS
from vr_jax.convert.exporting import choose_format
from vr_jax.convert.formats import LLAVA, Architecture
from vr_jax.convert.tables import TRANSPOSE, Slot, slots
from vr_jax.convert.weights import NON_LORA_FILES
from vr_jax.model.adaptation import ADAPTER, KERNEL, LORA_A, LORA_B
from vr_jax.storage import PathLike, UploadedFolder, as_path, complete_directory, write_json

PREFIX = "base_model.model."
# Names that end so are parameters of a module of their own, which PEFT can keep in full.
_OF_MODULES = (".weight", ".bias")

logger = logging.getLogger("vr_jax.convert")


def write_adapter(
    target: PathLike,
    sections: Mapping[str, Any],
    params: Mapping[str, Any],
    trained: frozenset[str],
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    base: str = "",
    owner: str = "",
    lacking: Mapping[str, frozenset[int]] = MappingProxyType({}),
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    The names are those that the modules of the model have in transformers 5, where it has the model, and otherwise in
    LLaVA. What was trained in full is kept as `modules_to_save`, if it belongs to modules of transformers without an
    adapter, and otherwise in a file like LLaVA's `non_lora_trainables.bin`.

    Args:
        target: The folder, which appears only when it is complete.
        sections: The sections of the model's config.
        params: Arrays by merged path: those of the plain model with the kernels of the base, and `lora_a` and `lora_b`
            of each adapter. They are only read from where the files need them.
        trained: The merged paths of the parameters that were trained in full.
        rank: Rank of the adapters.
        alpha: What divided by the rank is their scale.
        rslora: Whether it is divided by the root of the rank instead.
        base: Where the model of the base is, for adapter_config.json.
        owner: Who writes the folder (`storage.complete_directory`).
        lacking: By the merged path of a kernel, the layers that have no adapter where others of their stack have one.

    Raises:
        UserError: No format has a place for the model, or the folder cannot be written.
    """
    target = as_path(target)
    architecture, _ = choose_format(sections, target)
    if not sections["image"]["unpad"] and architecture is not LLAVA:
        params = {path: array for path, array in params.items() if path != "image_newline"}
    plain = {path: array for path, array in params.items() if not path.endswith(ADAPTER)}
    places = slots(architecture.table(architecture.sections, sections), plain)
    tensors: dict[str, np.ndarray] = {}
    targets: list[str] = []
    unnamed: set[str] = set()
    for name, slot in places.items():
        stems = [path.removesuffix(KERNEL) for path in slot.paths]
        adapted = [
            stem for stem in stems if stem + LORA_A in params and slot.index not in lacking.get(stem + KERNEL, ())
        ]
        if not adapted:
            continue
        if len(stems) > 1 or slot.transform is not TRANSPOSE:
            unnamed.update(adapted)
            continue
        module = in_memory(name, architecture).removesuffix(".weight")
        targets.append(module)
        for part, end in (("A", LORA_A), ("B", LORA_B)):
            array = np.asarray(params[stems[0] + end], np.float32)
            matrix = array if slot.index is None else array[slot.index]
            tensors[f"{PREFIX}{module}.lora_{part}.weight"] = np.ascontiguousarray(matrix.T)
    saved, others = _in_full(architecture, places, trained, targets)
    host = {path: np.asarray(plain[path]) for slot in (saved | others).values() for path in slot.paths}
    tensors |= {PREFIX + in_memory(name, architecture): slot.take(host) for name, slot in saved.items()}
    left = {PREFIX + in_memory(name, architecture): slot.take(host) for name, slot in others.items()}
    modules = sorted({in_memory(name, architecture).rpartition(".")[0] for name in saved})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base or None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "target_modules": sorted(targets),
        "exclude_modules": None,
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }
    size = sum(array.nbytes for array in (*tensors.values(), *left.values()))
    with complete_directory(target, size=size, overwrite=True, owner=owner) as written:

        def write_files() -> None:
            if not distributed.is_first():
                return
            with UploadedFolder(written) as files:
                save_file(tensors, files.local / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
                if left:
                    save_file(left, files.local / NON_LORA_FILES[1], metadata={"format": "pt"})
                files.upload()
            write_json(written / ADAPTER_CONFIG, config)

        distributed.together(write_files)
    if unnamed:
        logger.warning(
            "%s lacks the adapters of %s, which %s packs into one tensor; the model directory has them merged",
            target,
            ", ".join(sorted(unnamed)),
            architecture.name,
        )
    if left and architecture is not LLAVA:
        logger.warning(
            "%s: peft does not read %s, which holds %d tensors that are no modules of transformers' model, e.g. %s",
            target,
            NON_LORA_FILES[1],
            len(left),
            next(iter(left)),
        )
    note = "; transformers lacks the model, so `vr-jax convert import --base` reads it and peft does not"
    logger.info(
        "adapter: %s, %d modules of %s%s",
        target,
        len(targets),
        architecture.name,
        note if architecture is LLAVA else "",
    )


def _in_full(
    architecture: Architecture, places: Mapping[str, Slot], trained: frozenset[str], targets: list[str]
) -> tuple[dict[str, Slot], dict[str, Slot]]:
    """The tensors that were trained in full: those of whole modules for PEFT, and the others."""
    named = {name: slot for name, slot in places.items() if trained.intersection(slot.paths)}
    if architecture is LLAVA:
        return {}, named
    modules = {
        name.rpartition(".")[0]
        for name in named
        if name.endswith(_OF_MODULES) and in_memory(name, architecture).rpartition(".")[0] not in targets
    }
    saved = {
        name: slot for name, slot in places.items() if name.endswith(_OF_MODULES) and name.rpartition(".")[0] in modules
    }
    return saved, {name: slot for name, slot in named.items() if name not in saved}


def in_memory(name: str, architecture: Architecture) -> str:
    """Returns the name that a tensor of a file has in the model in memory.

    Args:
        name: The name of the tensor in files.
        architecture: The format.
    """
    names = (re.sub(pattern, replacement, name) for pattern, replacement in architecture.in_memory)
    return next((one for one in names if one != name), name)
