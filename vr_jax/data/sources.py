"""Random-access sources of conversations: `len`, `source[i] -> Conversation | Skip`, picklable for worker processes.

Nothing is kept in memory but an index: JSON files are mapped, parquet shards are read by row group, array_record files
by record. A file that cannot be read raises SourceError when it is opened; a record that cannot be used is a Skip.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vr_jax.data.demo.source import DemoSource
from vr_jax.data.llava_json import LlavaJson
from vr_jax.data.llava_parquet import LlavaParquet
from vr_jax.data.prepared import ArrayRecord
from vr_jax.data.records import SourceError
from vr_jax.data.types import Conversation, Skip

FORMATS = ("llava_json", "llava_parquet", "array_record")
KNOWN = ("path", "images", "format", "split", "follow_links")


class Source(Protocol):
    """What the pipeline needs. An attribute `blocks` may give the first indices of groups that are cheap to read
    together; they are then shuffled as groups, a few at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation | Skip: ...


class Joined:
    """Several sources behind one another."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation | Skip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - (int(self._ends[which - 1]) if which else 0)]

    @property
    def blocks(self) -> list[int] | None:
        """If any member is read in blocks; the records of the others are blocks of one."""
        if all(getattr(source, "blocks", None) is None for source in self.sources):
            return None
        starts: list[int] = []
        for source, end in zip(self.sources, self._ends, strict=True):
            begin = int(end) - len(source)
            starts += [begin + first for first in getattr(source, "blocks", None) or range(len(source))]
        return starts

    def __repr__(self) -> str:
        return f"Joined({self.sources})"


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens what a recipe describes.

    spec: `path` (a file, a folder of shards, a glob pattern or a list of these), `images` (image folder, default: the
    folder of the file), `format` ("llava_json", "llava_parquet", "array_record"; default: by the file's name),
    `split` (of a prepared set, default "train"), `follow_links`.
    Or `format`: "demo" with `split`, `size`, `seed` and `turns` of `demo.source.DemoSource`.
    Raises SourceError."""
    demo = spec.get("format") == "demo"
    known = ("format", "split", "size", "seed", "turns") if demo else KNOWN
    unknown = sorted(set(spec) - set(known))
    if unknown:
        raise SourceError(f"data source: unknown field(s) {unknown}, known are {list(known)}")
    if demo:
        options = {name: spec[name] for name in ("seed", "turns") if name in spec}
        try:
            return DemoSource(spec.get("split", "train"), spec.get("size", 10_000), **options)
        except ValueError as error:
            raise SourceError(str(error)) from error
    if not spec.get("path"):
        raise SourceError("data source: `path` is not set")
    paths = [Path(p) for p in _expand(spec["path"])]
    formats = {spec.get("format") or _guess_format(path) for path in paths}
    if len(formats) != 1 or not formats <= set(FORMATS):
        raise SourceError(f"{spec['path']}: format {sorted(formats)}, expected one of {list(FORMATS)} for all files")
    (kind,) = formats
    links = bool(spec.get("follow_links", False))
    if kind == "array_record":
        sources: list[Source] = [ArrayRecord(path, spec.get("split") or "train") for path in paths]
    elif kind == "llava_parquet":
        shards = [shard for path in paths for shard in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
        sources = [LlavaParquet(shards, spec.get("images"), follow_links=links)]
    else:
        sources = [LlavaJson(path, spec.get("images") or path.parent, follow_links=links) for path in paths]
    if not sum(len(source) for source in sources):
        raise SourceError(f"{spec['path']}: no records")
    return sources[0] if len(sources) == 1 else Joined(sources)


def _expand(path: str | Path | Iterable[str | Path]) -> list[str]:
    if not isinstance(path, str | Path):
        return [one for part in path for one in _expand(part)]
    text = str(path)
    if not glob.has_magic(text):
        return [text]
    found = sorted(glob.glob(text))
    if not found:
        raise SourceError(f"{text}: no file matches this pattern")
    return found


def _guess_format(path: Path) -> str:
    if path.suffix in (".json", ".jsonl"):
        return "llava_json"
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return "llava_parquet"
    if path.is_dir() and any(path.glob("**/dataset_info.json")):
        return "array_record"
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    raise SourceError(
        f"{path}: cannot tell the format from the name; expected .json, .jsonl, .parquet, a folder of .parquet files "
        "or a prepared set, or set `format`"
    )
