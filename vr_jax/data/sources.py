"""Random-access sources of conversations: `len(source)` and `source[index] -> Conversation | Skip`.

A source keeps only an index in memory. JSON files are memory-mapped, parquet shards are read by row group, and
array_record files are read by record. A source can be pickled, so that worker processes can read from it. A file that
cannot be read is a `UserError` when the source is opened; a record that cannot be used is a `Skip`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from vr_jax.data.llava_json import LlavaJsonSource
from vr_jax.data.llava_parquet import LlavaParquetSource
from vr_jax.data.prepared import ArrayRecordSource
from vr_jax.data.shards import files_below, is_numbered, missing_numbers, of_split, require_complete
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError
from vr_jax.fields import check_value
from vr_jax.hub import local_folder
from vr_jax.storage import Path, as_path, matching_paths, split_paths

Format = Literal["llava_json", "llava_parquet", "array_record"]
FORMATS: tuple[str, ...] = get_args(Format)
JSON_SUFFIXES = (".json", ".jsonl")
PACKED_SUFFIXES = (".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z")

logger = logging.getLogger("vr_jax.data")


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
    """Several sources that follow one another as one source. Its records know the number of their source.

    Attributes:
        sources: The sources in order.
        names: The name of each, or none if they need not be told apart.
        counts: The number of samples of each source in an epoch of training, where they are mixed by weights or shares
            (`vr_jax.data.mixture`); None if each record is read once.
    """

    def __init__(self, sources: Sequence[Source], names: Sequence[str] = (), counts: Sequence[int] | None = None):
        """Concatenates the sources."""
        self.sources = list(sources)
        self.names = tuple(names)
        self.counts = None if counts is None else tuple(counts)
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
        return self.part(which)[index - (int(self._ends[which - 1]) if which else 0)]

    def part(self, number: int) -> SourcePart:
        """Returns one of the sources, whose records know its number."""
        return SourcePart(self.sources[number], number)

    @property
    def lengths(self) -> list[int]:
        """The number of records of each source, by which a resumed run knows that their order is the same."""
        return [len(source) for source in self.sources]

    @property
    def blocks(self) -> list[int] | None:
        """The first index of each group of records that are cheap to read together.

        It is None if no source has such groups. A source without groups among others is divided into groups of the mean
        size of the others', so that shuffling mixes all of them alike.
        """
        found = [getattr(source, "blocks", None) for source in self.sources]
        groups = sum(len(blocks) for blocks in found if blocks is not None)
        if not groups:
            return None
        step = sum(len(one) for one, blocks in zip(self.sources, found, strict=True) if blocks is not None) // groups
        starts: list[int] = []
        for source, blocks, end in zip(self.sources, found, self._ends, strict=True):
            begin = int(end) - len(source)
            starts += [begin + first for first in (range(0, len(source), max(1, step)) if blocks is None else blocks)]
        return starts

    def __repr__(self) -> str:
        """Lists the sources."""
        return f"ConcatenatedSource({self.sources})"


class SourcePart:
    """One of several sources, whose records know its number."""

    def __init__(self, source: Source, number: int):
        """Gives the records of a source its number among several."""
        self._source, self._number = source, number

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._source)

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Returns a record."""
        record = self._source[index]
        return record if isinstance(record, Skip) else dataclasses.replace(record, source=self._number)

    @property
    def blocks(self) -> list[int] | None:
        """The first index of each group of records that are cheap to read together, or None."""
        return getattr(self._source, "blocks", None)

    def __repr__(self) -> str:
        """Describes the source."""
        return repr(self._source)


def concatenated(sources: Sequence[Source]) -> Source:
    """Returns several sources as one, and one source as it is."""
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources)


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
        path: A file, a folder, a glob pattern (`**` is any number of folders) or the name of a data set on the Hugging
            Face hub; several of them as a sequence, or as a text with commas between. What exists is never a pattern.
        images: The folder that image names are relative to. By default it is the folder of each JSON file; parquet
            files then must contain their images.
        format: The format of all files, one of `FORMATS`. By default it follows from the name of each file.
        split: The split to read where a folder has several (`vr_jax.data.shards.of_split`).
        follow_links: Whether symbolic links inside the image folder may lead out of it.

    Raises:
        UserError: A file cannot be read, its format is unknown, or there are no records.
        ConfigError: `format` is not one of the known formats.
    """
    check_value(Format | None, format, "data format")
    paths = _expand(path)
    if not paths:
        raise UserError("The data path is empty; set it to a file, a folder or a glob pattern.")
    found = [(kind, file) for one in paths for kind, file in _files_of(one, format, split)]
    sources: list[Source] = []
    for kind, group in itertools.groupby(found, key=lambda pair: pair[0]):
        files = [file for _, file in group]
        if kind == "array_record":
            sources += [ArrayRecordSource(one, split) for one in files]
        elif kind == "llava_parquet":
            sources.append(LlavaParquetSource(files, images, follow_links=follow_links))
        else:
            sources += [LlavaJsonSource(one, images or one.parent, follow_links=follow_links) for one in files]
    if not sum(len(source) for source in sources):
        raise UserError(f"{', '.join(map(str, paths))}: there are no records; check the path of the data.")
    return concatenated(sources)


def _expand(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Replaces lists by their parts, patterns by the paths that match them, and names on the hub by downloads."""
    if not isinstance(path, str | Path):
        return [one for part in path for one in _expand(part)]
    return [one for part in split_paths(str(path).strip()) for one in _matching(part)]


def _matching(text: str) -> list[Path]:
    """Returns what one path, pattern or name on the hub stands for."""
    found = matching_paths(text, "the data path")
    if found == [as_path(text, "the data path")]:  # It exists, or it is no pattern.
        return [local_folder(text, "dataset")]
    # A recursive pattern also matches the folders on the way to the files.
    found = [one for one in found if one.is_file()] or found
    for name, (missing, count) in missing_numbers(found).items():
        logger.warning("%s: only %d of %d files match the pattern %s", name, count - len(missing), count, text)
    return found


def _files_of(path: Path, format: str | None, split: str) -> list[tuple[str, Path]]:
    """Returns the files that a path stands for, each with its format; a prepared set is its folder."""
    if path.is_dir():
        return _files_in(path, format, split)
    return [(format or _format_of_file(path), path)]


def _files_in(folder: Path, format: str | None, split: str) -> list[tuple[str, Path]]:
    """Returns the data files of a folder: parquet shards at any depth, a JSON file, or the folder of a prepared set."""
    if format == "array_record":
        return [("array_record", folder)]
    # The folder may hold many images, so it is looked through once.
    found = files_below(folder, (".parquet", *JSON_SUFFIXES, *PACKED_SUFFIXES))
    shards, jsons, packed = (
        [one for one in found if one.suffix.lower() in suffixes]
        for suffixes in ((".parquet",), JSON_SUFFIXES, PACKED_SUFFIXES)
    )
    # Other programs write a dataset_info.json, too.
    if format is None and any(one.name == "dataset_info.json" for one in jsons):
        others = shards or any(one.suffix.lower() == ".jsonl" for one in jsons)
        if not others or any(folder.rglob("*.array_record*")):
            return [("array_record", folder)]
    if format != "llava_json" and shards:
        chosen = of_split(shards, split, folder)
        require_complete(chosen)
        folders = {one.parent for one in chosen}
        if len(folders) > 1 or len(chosen) < len(shards):
            logger.info(
                "%s: reading %d of its %d parquet files, in %d folders; the others belong to other splits than %r",
                *(folder, len(chosen), len(shards), len(folders), split),
            )
        return [("llava_parquet", one) for one in chosen]
    if format == "llava_parquet":
        raise UserError(f"{folder}: there is no parquet file in the folder or below it; check the path of the data.")
    texts = [one for one in jsons if one.parent == folder]
    if texts:
        chosen = of_split(texts, split, folder)
        require_complete(chosen)
        if len(chosen) > 1 and not all(map(is_numbered, chosen)):
            names = ", ".join(one.name for one in chosen[:10]) + (", ..." if len(chosen) > 10 else "")
            raise UserError(
                f"{folder}: the folder has several JSON files ({names}); give one of them, several with commas "
                f"between, or all of them as {folder}/*{chosen[0].suffix}."
            )
        return [("llava_json", one) for one in chosen]
    hint = ""
    if jsons:
        hint = f" Below it is {jsons[0].relative_to(folder)}: give this file, or a pattern such as {folder}/**/*.json."
    elif packed:
        hint = f" It has {packed[0].relative_to(folder)}, which must be unpacked first."
    raise UserError(
        f"{folder}: the folder has no data that are known: expected .parquet files at any depth, one .json or .jsonl "
        f"file, or a prepared set.{hint}"
    )


def _format_of_file(path: Path) -> str:
    """Finds the format from the name of a file."""
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "llava_json"
    if suffix == ".parquet":
        return "llava_parquet"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path of the data.")
    if suffix in PACKED_SUFFIXES:
        raise UserError(f"{path}: the file is compressed; unpack it first, e.g. with gunzip or unzip.")
    raise UserError(
        f"{path}: the name does not tell the format. Expected a .json, .jsonl or .parquet file, a folder of .parquet "
        "files, or a prepared set; otherwise set `format`."
    )
