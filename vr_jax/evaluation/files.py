"""Which files below a folder hold a benchmark's rows: the published parquet files, or JSONL with images."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.evaluation.types import EvaluationError

_SHARD = re.compile(r"-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Wanted:
    """What to look for: `<split>.jsonl`, or parquet files as published on the Hugging Face hub: `<split>-*.parquet` (or
    `<split>/*.parquet`, as the hub converts data).

    config: where several configurations lie side by side, the folder that is meant. files: further names of parquet
    files. several_folders: the rows of all folders belong together."""

    split: str
    config: str | None = None
    files: tuple[str, ...] = ()
    several_folders: bool = False

    def names(self) -> list[str]:
        """What messages say."""
        folder = f"{self.config}/" if self.config else ""
        return [f"{self.split}.jsonl", f"{folder}{self.split}-*.parquet", *self.files]

    def matches(self, path: Path) -> bool:
        stem = path.stem
        return stem == self.split or stem.startswith(f"{self.split}-") or path.parent.name == self.split

    def patterns(self) -> list[str]:
        """The same as patterns of the hub's client."""
        folders = [f"{self.config}/", f"*/{self.config}/"] if self.config else ["", "*/"]
        return [f"{folder}{self.split}-*.parquet" for folder in folders] + list(self.files)


def find_jsonl(data: Path, wanted: Wanted) -> Path | None:
    """Raises EvaluationError if there is nothing at `data`."""
    if data.is_file():
        return data if data.suffix == ".jsonl" else None
    if not data.is_dir():
        raise EvaluationError(f"{data}: no such file or folder")
    folders = [data, data / wanted.config] if wanted.config else [data]
    return next((path for path in (folder / f"{wanted.split}.jsonl" for folder in folders) if path.is_file()), None)


def find_shards(data: Path, wanted: Wanted, columns: Collection[str]) -> list[Path]:
    """The parquet files, in the order of their names; `data` may also be one such file.

    columns: settle which folder is meant if several have such files. Raises EvaluationError if there are none, if one
    is missing from a numbered set, and where it cannot be told which folder is meant."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise EvaluationError(f"{data}: no such file or folder")
    visible = [path for path in sorted(data.rglob("*.parquet")) if not _is_hidden(path.relative_to(data))]
    found = [path for path in visible if wanted.matches(path)]
    found = found or [path for path in visible if path.name in wanted.files]
    if not found:
        looked_for = " nor ".join(wanted.names())
        raise EvaluationError(f"{data}: found neither {looked_for} (the published layout); it holds {_listed(data)}")
    folders = _of_config(data, sorted({path.parent for path in found}), wanted)
    if len(folders) > 1:
        having = [folder for folder in folders if _has(next(p for p in found if p.parent == folder), columns)]
        folders = having or folders[:1]
    if len(folders) > 1 and not wanted.several_folders:
        names = [str(folder.relative_to(data)) for folder in folders]
        raise EvaluationError(f"{data}: several folders hold {wanted.split}-*.parquet: {names}; give one (--data)")
    shards = [path for path in found if path.parent in folders]
    for folder in folders:
        _require_all([path for path in shards if path.parent == folder])
    return shards


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:10]


def _of_config(data: Path, folders: Sequence[Path], wanted: Wanted) -> Sequence[Path]:
    """The folders of the wanted configuration; without such a name, those that name none."""
    if wanted.config is None:
        return folders
    named = [folder for folder in folders if wanted.config in folder.relative_to(data.parent).parts]
    unnamed = [folder for folder in folders if folder.relative_to(data).parts in ((), ("data",), (wanted.split,))]
    if not named and not unnamed:
        names = [str(folder.relative_to(data)) for folder in folders]
        raise EvaluationError(f"{data}: no folder {wanted.config}; found {names} (another configuration?)")
    return named or unnamed


def _has(path: Path, columns: Collection[str]) -> bool:
    try:
        return set(columns) <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return True  # whoever reads it says what is wrong


def _require_all(shards: Sequence[Path]) -> None:
    """Files are numbered "-00000-of-00004"; a download that broke off must not pass for a smaller benchmark."""
    numbered = [match for path in shards if (match := _SHARD.search(path.stem))]
    counts = {int(match[2]) for match in numbered}
    numbers = {int(match[1]) for match in numbered}
    if len(counts) > 1 or (numbered and len(numbers) < len(shards)):
        raise EvaluationError(
            f"{shards[0].parent}: the parquet files {[path.name for path in shards][:10]} are of different downloads, "
            "rows would count twice; keep those of one"
        )
    if not counts:
        return
    missing = sorted(set(range(counts.pop())) - numbers)
    if missing:
        raise EvaluationError(
            f"{shards[0].parent}: {len(shards)} of {len(shards) + len(missing)} parquet files are there; "
            f"missing numbers {missing[:10]}. Repeat the download"
        )
