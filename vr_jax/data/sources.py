"""Random-access sources of conversations: `len(source)` and `source[index] -> Conversation | Skip`.

A source keeps only an index in memory. JSON files are memory-mapped, parquet shards are read by row group, and
array_record files are read by record. A source can be pickled, so that worker processes can read from it. A file that
cannot be read is a `UserError` when the source is opened; a record that cannot be used is a `Skip`.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from vr_jax.data.llava_json import LlavaJsonSource
from vr_jax.data.llava_parquet import LlavaParquetSource
from vr_jax.data.prepared import ArrayRecordSource
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError
from vr_jax.fields import check_value

Format = Literal["llava_json", "llava_parquet", "array_record"]
FORMATS: tuple[str, ...] = get_args(Format)


@runtime_checkable
class Source(Protocol):
    """The interface of a source that the input pipeline needs.

    A source may also have an attribute `blocks`: the first index of each group of records that are cheap to read
    together. The pipeline then shuffles whole groups, a few at a time.
    """

    def __len__(self) -> int:
        """Returns the number of records."""
        ...

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Returns a record, or the reason why it cannot be used."""
        ...


class ConcatenatedSource:
    """Several sources that follow one another as one source.

    Attributes:
        sources: The sources in order.
    """

    def __init__(self, sources: Sequence[Source]):
        """Concatenates the sources."""
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        """Returns the number of records of all sources."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Returns a record of the source that contains it.

        Raises:
            IndexError: There is no record with this index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: {self!r} has records 0..{len(self) - 1}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - (int(self._ends[which - 1]) if which else 0)]

    @property
    def blocks(self) -> list[int] | None:
        """The first index of each group of records that are cheap to read together.

        It is None if no source has such groups; a source without groups among others has groups of one record.
        """
        if all(getattr(source, "blocks", None) is None for source in self.sources):
            return None
        starts: list[int] = []
        for source, end in zip(self.sources, self._ends, strict=True):
            begin = int(end) - len(source)
            starts += [begin + first for first in getattr(source, "blocks", None) or range(len(source))]
        return starts

    def __repr__(self) -> str:
        """Lists the sources."""
        return f"ConcatenatedSource({self.sources})"


def open_source(
    path: str | Path | Sequence[str | Path],
    *,
    images: str | Path | None = None,
    format: str | None = None,
    split: str = "train",
    follow_links: bool = False,
) -> Source:
    """Opens data files as one source.

    Args:
        path: A file, a folder of parquet shards or of a prepared set, a glob pattern, or a sequence of these.
        images: The folder that image names are relative to. By default it is the folder of each JSON file; parquet
            files then must contain their images.
        format: The format of all files, one of `FORMATS`. By default it follows from the name of each file.
        split: The split of a prepared set (format "array_record").
        follow_links: Whether symbolic links inside the image folder may lead out of it.

    Raises:
        UserError: A file cannot be read, its format is unknown, or there are no records.
        ConfigError: `format` is not one of the known formats.
    """
    check_value(Format | None, format, "data format")
    paths = _expand(path)
    if not paths:
        raise UserError("The data path is empty; set it to a file, a folder or a glob pattern.")
    formats = {one: format or _guess_format(one) for one in paths}
    if len(set(formats.values())) > 1:
        found = ", ".join(f"{one} ({kind})" for one, kind in formats.items())
        raise UserError(f"The data files have several formats: {found}. Open files of one format at a time.")
    (kind,) = set(formats.values())
    sources: list[Source]
    if kind == "array_record":
        sources = [ArrayRecordSource(one, split) for one in paths]
    elif kind == "llava_parquet":
        shards = [shard for one in paths for shard in (sorted(one.glob("*.parquet")) if one.is_dir() else [one])]
        sources = [LlavaParquetSource(shards, images, follow_links=follow_links)]
    else:
        sources = [LlavaJsonSource(one, images or one.parent, follow_links=follow_links) for one in paths]
    if not sum(len(source) for source in sources):
        raise UserError(f"{', '.join(map(str, paths))}: there are no records; check the path of the data.")
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources)


def _expand(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Replaces glob patterns by the paths that match them."""
    if not isinstance(path, str | Path):
        return [one for part in path for one in _expand(part)]
    if not str(path):
        return []
    text = str(Path(path).expanduser())
    if not glob.has_magic(text):
        return [Path(text)]
    found = sorted(glob.glob(text))
    if not found:
        raise UserError(f"{text}: no file matches this pattern.")
    return [Path(one) for one in found]


def _guess_format(path: Path) -> str:
    """Finds the format from the name of a file or from the contents of a folder."""
    if path.suffix in (".json", ".jsonl"):
        return "llava_json"
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return "llava_parquet"
    if path.is_dir() and any(path.glob("**/dataset_info.json")):
        return "array_record"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path of the data.")
    raise UserError(
        f"{path}: the name does not tell the format. Expected a .json, .jsonl or .parquet file, a folder of .parquet "
        "files, or a prepared set; otherwise set `format`."
    )
