"""The search for the files of a benchmark below a folder: published parquet files, or JSONL with images."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.errors import UserError
from vr_jax.storage import Path, for_library, in_order

_SHARD = re.compile(r"-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Wanted:
    """The files of a split.

    They are `<split>.jsonl`, or parquet files named as on the Hugging Face hub (`<split>-*.parquet`) or as in the hub's
    own conversion of a dataset (`<split>/*.parquet`).

    Attributes:
        split: The split.
        config: The folder of the wanted configuration, where several configurations lie side by side.
        files: Further names of parquet files.
        several_folders: Whether the files of all folders belong together.
    """

    split: str
    config: str | None = None
    files: tuple[str, ...] = ()
    several_folders: bool = False

    def names(self) -> list[str]:
        """Returns the names of the files, as messages show them."""
        folder = f"{self.config}/" if self.config else ""
        return [f"{self.split}.jsonl", f"{folder}{self.split}-*.parquet", *self.files]

    def matches(self, path: Path) -> bool:
        """Says whether a parquet file has a name of the split."""
        stem = path.stem
        return stem == self.split or stem.startswith(f"{self.split}-") or path.parent.name == self.split

    def patterns(self) -> list[str]:
        """Returns the names of the parquet files as patterns for the client of the Hugging Face hub."""
        folders = [f"{self.config}/", f"*/{self.config}/"] if self.config else ["", "*/"]
        return [f"{folder}{self.split}-*.parquet" for folder in folders] + list(self.files)


def find_jsonl(data: Path, wanted: Wanted) -> Path | None:
    """Finds the JSONL file of a split.

    Args:
        data: A folder, or a JSONL file.
        wanted: The split.

    Returns:
        The file, or None if there is none.

    Raises:
        UserError: `data` does not exist.
    """
    if data.is_file():
        return data if data.suffix == ".jsonl" else None
    if not data.is_dir():
        raise UserError(no_such_data(data))
    folders = [data, data / wanted.config] if wanted.config else [data]
    return next((path for path in (folder / f"{wanted.split}.jsonl" for folder in folders) if path.is_file()), None)


def no_such_data(data: Path) -> str:
    """Returns the message for data that do not exist."""
    advice = "give the folder of the benchmark's files, or leave out --data to download them"
    return f"{data}: no such file or folder; {advice}"


def find_shards(data: Path, wanted: Wanted, columns: Collection[str]) -> list[Path]:
    """Finds the parquet files of a split.

    Args:
        data: A folder, or one parquet file.
        wanted: The split.
        columns: Columns of the benchmark. If several folders have files of the split, those with the columns are used.

    Returns:
        The files in the order of their names.

    Raises:
        UserError: There are no such files, one of a numbered set is missing, or several folders have such files.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UserError(no_such_data(data))
    visible = [path for path in in_order(data.rglob("*.parquet")) if not _is_hidden(path.relative_to(data))]
    found = [path for path in visible if wanted.matches(path)]
    found = found or [path for path in visible if path.name in wanted.files]
    if not found:
        looked_for = " nor ".join(wanted.names())
        raise UserError(f"{data}: found neither {looked_for} (the published layout); the folder holds {_listed(data)}")
    folders = _of_config(data, sorted({path.parent for path in found}), wanted)
    if len(folders) > 1:
        having = [folder for folder in folders if _has(next(p for p in found if p.parent == folder), columns)]
        folders = having or folders[:1]
    if len(folders) > 1 and not wanted.several_folders:
        names = [str(folder.relative_to(data)) for folder in folders]
        raise UserError(f"{data}: several folders hold {wanted.split}-*.parquet: {names}; choose one of them (--data)")
    shards = [path for path in found if path.parent in folders]
    for folder in folders:
        _require_all([path for path in shards if path.parent == folder])
    return shards


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:10]


def _of_config(data: Path, folders: Sequence[Path], wanted: Wanted) -> Sequence[Path]:
    """Returns the folders of the wanted configuration, or else those whose names are of no configuration."""
    if wanted.config is None:
        return folders
    named = [folder for folder in folders if wanted.config in folder.relative_to(data.parent).parts]
    unnamed = [folder for folder in folders if folder.relative_to(data).parts in ((), ("data",), (wanted.split,))]
    if not named and not unnamed:
        names = [str(folder.relative_to(data)) for folder in folders]
        raise UserError(
            f"{data}: the benchmark needs the configuration {wanted.config}, but there is no folder {wanted.config}; "
            f"found {names}"
        )
    return named or unnamed


def _has(path: Path, columns: Collection[str]) -> bool:
    try:
        return set(columns) <= set(pq.read_schema(for_library(path)).names)
    except (pa.ArrowException, OSError):
        return True  # The reader of the file reports what is wrong with it.


def _require_all(shards: Sequence[Path]) -> None:
    """Raises UserError if the files are not a complete set of one download.

    Files are numbered like "-00000-of-00004". A download that was interrupted must not pass for a smaller benchmark.
    """
    numbered = [match for path in shards if (match := _SHARD.search(path.stem))]
    counts = {int(match[2]) for match in numbered}
    numbers = {int(match[1]) for match in numbered}
    if len(counts) > 1 or (numbered and len(numbers) < len(shards)):
        raise UserError(
            f"{shards[0].parent}: the parquet files {[path.name for path in shards][:10]} come from different "
            "downloads, so that some rows would count twice; keep the files of one download"
        )
    if not counts:
        return
    missing = sorted(set(range(counts.pop())) - numbers)
    if missing:
        raise UserError(
            f"{shards[0].parent}: only {len(shards)} of {len(shards) + len(missing)} parquet files are there; the "
            f"numbers {missing[:10]} are missing; repeat the download"
        )
