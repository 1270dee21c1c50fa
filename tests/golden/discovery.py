"""Finds the recorded outputs of the official code by reading what is there; no case or count is written down.

The folder is `VR_JAX_GOLDEN` (default `../shared/golden` beside the repository). Where it, or an item, is
absent, the lists below hold one parameter marked as skipped, so that the reason is printed and no test vanishes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("VR_JAX_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
DATA_ROOT = Path(os.environ.get("VR_JAX_DATA", REPOSITORY.parent / "shared" / "data"))


def needs_data(*parts: str) -> pytest.MarkDecorator:
    """Marks a test that reads the real file `parts` below `VR_JAX_DATA` (`../shared/data`)."""
    path = DATA_ROOT.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"no real data at {path} (set VR_JAX_DATA)")


@dataclass(frozen=True)
class Case:
    """One recorded case of `<item>.json`; `spec` is its entry there, `document` the whole file."""

    item: str
    name: str
    spec: dict[str, Any] = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    folder: Path = field(repr=False)

    @property
    def kind(self) -> str:
        return self.spec.get("kind", self.item)

    @property
    def config(self) -> dict[str, Any]:
        return self.spec.get("config", {})

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays of the case's file, float16 upcast to float32 (it is exact by construction)."""
        raw = load_file(self.folder / self.spec.get("file", f"{self.name}.safetensors"))
        return {key: a.astype(np.float32) if a.dtype == np.float16 else a for key, a in raw.items()}

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays `prefix.*` (`weights`, `in`, `out`) without the prefix."""
        return {k[len(prefix) + 1 :]: a for k, a in self.tensors.items() if k.startswith(prefix + ".")}

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return self.group("weights")

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.group("in")

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        return self.group("out")

    def tolerance(self, what: str | None = None) -> dict[str, float]:
        """`{"atol": a, "rtol": r}` of the case file, or its entry named `what` (e.g. "llm logits")."""
        table = self.spec.get("tolerance", self.document["tolerance"])
        if what is not None:
            return dict(table[what])
        return {"atol": table["atol"], "rtol": table["rtol"]}


@functools.cache
def documents(item: str) -> tuple[tuple[Path, dict[str, Any]], ...]:
    """(path, content) of an item's JSON files: `methods/<item>/**/*.json` or `scoring/<item>*.json`."""
    paths = sorted((ROOT / "methods" / item).rglob("*.json")) or sorted((ROOT / "scoring").glob(f"{item}*.json"))
    return tuple((path, json.loads(path.read_text(encoding="utf-8"))) for path in paths)


def _absent(item: str, what: str) -> list:
    reason = f"no recorded {what} of {item!r} under {ROOT} (set VR_JAX_GOLDEN)"
    return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]


def cases(item: str, known: Collection[str] | None = None, slow: Collection[str] = ()) -> list:
    """Parameters for `pytest.mark.parametrize("case", ...)`, one `Case` each.

    With `known`, a case of another kind is skipped by name: its part does not exist yet in this project. Cases whose
    names are in `slow` get that marker."""
    found = []
    for path, document in documents(item):
        listed = document.get("cases", {})
        named = listed.items() if isinstance(listed, dict) else [(str(c["id"]), c) for c in listed]
        for name, spec in named:
            case = Case(item, name, spec, document, path.parent)
            unknown = known is not None and case.kind not in known
            reason = f"{item} case {name!r}: kind {case.kind!r} is not part of vr_jax yet"
            marks = [pytest.mark.skip(reason=reason)] if unknown else [pytest.mark.slow] if name in slow else []
            found.append(pytest.param(case, id=f"{path.stem}-{name}", marks=marks))
    return found or _absent(item, "cases")


@dataclass(frozen=True)
class Entry:
    """One element of a list in a case file (`anyres` records, `labels` samples, ...)."""

    value: dict[str, Any] = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    folder: Path = field(repr=False)


def entries(item: str, key: str) -> list:
    """Parameters, one `Entry` for each element of the list `key` in every JSON file of an item."""
    found = [
        pytest.param(Entry(value, document, path.parent), id=f"{path.stem}-{key}{index}")
        for path, document in documents(item)
        for index, value in enumerate(document.get(key, ()))
    ]
    return found or _absent(item, key)
