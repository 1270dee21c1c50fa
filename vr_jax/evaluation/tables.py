"""Rows of a benchmark in either layout: the published Hugging Face parquet files, or JSONL with an image folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, images_of
from vr_jax.data.skips import SkipRecord
from vr_jax.evaluation.types import EvaluationError


@dataclass(frozen=True)
class Row:
    """One row: its columns without the picture, the encoded picture(s), and why it is unusable, if it is."""

    id: str  # <split>-<number of the row>, the same in both layouts
    values: Mapping[str, Any]
    images: tuple[Path | bytes, ...] = field(repr=False)
    problem: str | None = None


def read_rows(data: Path, split: str, columns: Sequence[str]) -> list[Row]:
    """All rows of `<data>/<split>.jsonl` (picture names relative to its folder), or of the parquet files
    `<split>-*.parquet` below `data` (pictures inside); `data` may also be one such file.

    columns: must be there and hold text, next to `image`; a row where one does not gets a `problem`.
    Raises EvaluationError if there is no such file, it cannot be read, or has no rows."""
    rows = [
        _row(f"{split}-{number:05d}", record, folder, columns)
        for number, (record, folder) in enumerate(_records(data, split, columns))
    ]
    if not rows:
        raise EvaluationError(f"{data}: split {split!r} has no rows")
    return rows


def _row(row_id: str, record: Any, folder: ImageFolder, columns: Sequence[str]) -> Row:
    if not isinstance(record, Mapping):
        return Row(row_id, {}, (), f"malformed_record: {record}")
    values = {name: value for name, value in record.items() if name != "image"}
    try:
        for name in columns:
            if not isinstance(values.get(name), str):
                found = type(values[name]).__name__ if name in values else "nothing"
                raise SkipRecord("malformed_record", f"{name}: expected a text, found {found}")
        images = images_of(record, folder)
        if not images:
            raise SkipRecord("missing_image", "the row has no picture")
    except SkipRecord as error:
        return Row(row_id, values, (), str(error))
    return Row(row_id, values, images)


def _records(data: Path, split: str, columns: Sequence[str]) -> Iterator[tuple[Any, ImageFolder]]:
    """Raw records with the folder of their pictures; a text instead of a record says what is wrong with it."""
    if data.is_file():
        jsonl, shards = ([data], []) if data.suffix == ".jsonl" else ([], [data])
    elif data.is_dir():
        jsonl = [path for path in [data / f"{split}.jsonl"] if path.is_file()]
        shards = [] if jsonl else sorted(data.rglob(f"{split}-*.parquet"))
    else:
        raise EvaluationError(f"{data}: no such file or folder")
    if not jsonl and not shards:
        raise EvaluationError(
            f"{data}: found neither {split}.jsonl nor {split}-*.parquet (the published layout); "
            f"it holds {sorted(path.name for path in data.iterdir())[:10]}"
        )
    for path in jsonl:
        folder = ImageFolder(path.parent)
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if line.strip():
                yield _parsed(line, f"{path.name}, line {number}"), folder
    for path in shards:
        folder = ImageFolder(None)
        for record in _parquet_records(path, columns):
            yield record, folder


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        return f"{where}: {error}"


def _parquet_records(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    missing = [name for name in (*columns, "image") if name not in table.column_names]
    if missing:
        raise EvaluationError(f"{path}: no column(s) {missing}; found {table.column_names}")
    return table.to_pylist()
