"""LoRA adapters of PEFT and of LLaVA, read from their folders and merged into the parameters of a model.

A folder of PEFT holds `adapter_config.json` and `adapter_model.safetensors` or `.bin`. What LLaVA writes after training
with LoRA also holds `non_lora_trainables.bin`, the parameters that were trained in full, and the config.json of the
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vr_jax.convert.adapter_fields import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from vr_jax.convert.formats import LLAVA, Architecture
from vr_jax.convert.tables import TRANSPOSE, Slot, slots
from vr_jax.convert.weights import DTYPES, NON_LORA_FILES, Checkpoint, Tensor
from vr_jax.errors import UserError, message_list
from vr_jax.fields import shown
from vr_jax.storage import Path, PathLike, as_path

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FILES = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
_PREFIX = re.compile(r"^(?:module\.)?base_model\.model\.")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")


@dataclass(frozen=True)
class _Update:
    """The two matrices of one module, by their names in the file."""

    slot: Slot
    a: str
    b: str
    scale: float


class Adapter:
    """A folder with an adapter.

    Attributes:
        directory: The folder.
        config: What its adapter_config.json says.
        whole: Whether it has the config.json of a model, as what LLaVA writes.
        in_full: The weight file of `NON_LORA_FILES`, or None.
        ignored: Those of the names to be ignored that its adapter_config.json has.
    """

    def __init__(self, directory: PathLike, ignored: Sequence[str] = ()):
        """Reads adapter_config.json and the headers of the weight files.

        Args:
            directory: The folder.
            ignored: Names of fields that are left out of consideration.

        Raises:
            UserError: A file is missing or damaged, or says what is not computed here.
        """
        self.directory: Path = as_path(directory)
        self.config: AdapterConfig = read_adapter_config(self.directory, ignored)
        self.ignored = frozenset(ignored).intersection(self.config.fields)
        self._weights: Checkpoint = Checkpoint(self.directory, ADAPTER_WEIGHTS)
        self.whole: bool = (self.directory / "config.json").is_file()
        in_full = any((self.directory / name).is_file() for name in NON_LORA_FILES)
        self.in_full = Checkpoint(self.directory, NON_LORA_FILES) if in_full else None

    def merge(
        self,
        params: dict[str, np.ndarray],
        sections: Mapping[str, Any],
        architectures: Sequence[Architecture],
        report: Callable[[str], None],
        *,
        with_full: bool = True,
    ) -> None:
        """Adds the adapter to the kernels of a model, and puts in what was trained in full.

        A kernel is added up in float32 and rounded once to the type in which it is kept.

        Args:
            params: Arrays by merged path, which can be written to.
            sections: The sections of the model's config.
            architectures: The formats in which the model could be written; the first that has all names is taken.
            report: Receives lines about what was merged.
            with_full: Whether the parameters of `NON_LORA_FILES` are put in too.

        Raises:
            UserError: A tensor has no place in the model, or another shape, or the files contradict each other.
        """
        problems: list[str] = []
        for architecture in architectures:
            places = slots(architecture.table(architecture.sections, sections), params)
            found, updates, full = self._plan(architecture, places, with_full)
            if not found:
                break
            problems = problems or found
        else:
            raise UserError(message_list(f"{self.directory} does not fit the model of --base:", problems))
        for update in updates:
            pair = dict(self._weights.read({update.a: None, update.b: None}))
            self._check_finite(pair)
            with np.errstate(over="ignore", invalid="ignore"):
                change = np.float32(update.scale) * (
                    pair[update.b].astype(np.float32) @ pair[update.a].astype(np.float32)
                )
            if not np.isfinite(change).all():
                raise UserError(
                    f"{self.directory}: {update.a} and {update.b}, multiplied with each other and with "
                    f"{update.scale:g}, are larger than float32 holds; lora_alpha or r in {ADAPTER_CONFIG} is wrong"
                )
            update.slot.add(change, params)
        for checkpoint, names in full:
            for original, tensor in checkpoint.read(names):
                self._check_finite({original: tensor})
                names[original].place(tensor, params)
        count = sum(len(names) for _, names in full)
        report(
            f"{self.directory}: LoRA of {len(updates)} modules merged, and {count} tensors that were trained in full "
            f"({architecture.name})"
        )

    def _plan(
        self, architecture: Architecture, places: Mapping[str, Slot], with_full: bool
    ) -> tuple[list[str], list[_Update], list[tuple[Checkpoint, dict[str, Slot]]]]:
        """What does not fit, and the places of all tensors by the names of a format."""
        problems: list[str] = []
        matrices: dict[str, dict[str, Tensor]] = {}
        originals: dict[tuple[str, str], str] = {}
        saved: dict[str, Slot] = {}
        taken: dict[str, str] = {}
        problems += [
            f"modules_to_save names {name!r}, which the model has and the file lacks"
            for name in self.config.saved
            if not _has(self._weights.tensors, name) and _has(places, name)
        ]
        for original, tensor in self._weights.tensors.items():
            if tensor.dtype not in DTYPES:
                problems.append(f"{original}: found {tensor.dtype}, expected one of {', '.join(DTYPES)}")
                continue
            name = _PREFIX.sub("", original)
            match = _LORA.fullmatch(name)
            if match is None:
                module = name.rpartition(".")[0]
                if "lora_" in name or not self.config.saves(module):
                    problems.append(f"{original}: neither a matrix of LoRA for a linear layer nor of modules_to_save")
                    continue
                problems += self._place(original, tensor, _renamed(name, architecture), places, saved, taken)
            elif not self.config.names(match["module"]):
                problems.append(f"{original}: target_modules and the other fields of its config leave this module out")
            elif (twice := originals.setdefault((match["module"], match["matrix"]), original)) != original:
                problems.append(f"{original}: the file holds this matrix twice, also as {twice}")
            else:
                matrices.setdefault(match["module"], {})[match["matrix"]] = tensor
        updates = []
        for module, found in matrices.items():
            name = _renamed(f"{module}.weight", architecture)
            slot = places.get(name)
            if name in taken:
                problems.append(f"{module}: there is {taken[name]} for it too")
                continue
            taken[name] = originals[module, min(found)]
            if slot is None or slot.transform is not TRANSPOSE:
                problems.append(f"{module}: the model has no linear layer of this name ({architecture.name})")
                continue
            rank, (outputs, inputs) = self.config.rank_of(module), slot.shape
            shapes = {name: one.shape for name, one in sorted(found.items())}
            if shapes != {"A": (rank, inputs), "B": (outputs, rank)}:
                problems.append(
                    f"{module}: found {shown(shapes)}, expected A {(rank, inputs)} and B {(outputs, rank)} "
                    f"({ADAPTER_CONFIG} gives it the rank {rank})"
                )
                continue
            a, b = originals[module, "A"], originals[module, "B"]
            updates.append(_Update(slot, a, b, self.config.scale_of(module)))
        full = [(self._weights, saved)]
        if not self._weights.tensors:
            problems.append("its weight file holds no tensor")
        if self.in_full is not None and with_full:
            others: dict[str, Slot] = {}
            for original, tensor in self.in_full.tensors.items():
                name = _renamed(_PREFIX.sub("", original), architecture)
                if any(re.fullmatch(pattern, name) for pattern, _ in architecture.ignored):
                    continue
                problems += self._place(original, tensor, name, places, others, taken)
            full.append((self.in_full, others))
        return problems, updates, full

    def _place(
        self,
        original: str,
        tensor: Tensor,
        name: str,
        places: Mapping[str, Slot],
        found: dict[str, Slot],
        taken: dict[str, str],
    ) -> Iterator[str]:
        """Notes the place of a tensor that is put in as it is, or yields what is wrong with it."""
        slot = places.get(name)
        if (other := taken.setdefault(name, original)) != original:
            yield f"{original}: there is {other} for the same parameter too"
        elif slot is None:
            yield f"{original}: the model has no parameter of this name"
        elif tensor.shape != slot.shape:
            yield f"{original}: found {tensor.shape}, expected {slot.shape}"
        else:
            found[original] = slot

    def _check_finite(self, tensors: Mapping[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            if not np.isfinite(tensor.astype(np.float32)).all():
                raise UserError(f"{self.directory}: {name} holds NaN or infinite values; get the file again")


def _renamed(name: str, architecture: Architecture) -> str:
    for pattern, replacement in architecture.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _has(tensors: Iterable[str], module: str) -> bool:
    """Returns whether one of the names of tensors lies in a module of this name."""
    return any(f".{module}." in f".{name}" for name in tensors)


def is_adapter(directory: PathLike) -> bool:
    """Returns whether a folder holds an adapter of PEFT."""
    return (as_path(directory) / ADAPTER_CONFIG).is_file()


def formats_of(architecture: Architecture) -> tuple[Architecture, ...]:
    """Returns the formats whose names an adapter of a model may have: that of its export, and LLaVA's own."""
    return (architecture,) if architecture is LLAVA or architecture.holds != "model" else (architecture, LLAVA)
