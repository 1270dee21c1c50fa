"""Rows of a benchmark, from the published Hugging Face parquet files or from JSONL with an image folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, images_of
from vr_jax.data.skips import SkipRecord
from vr_jax.evaluation.files import Wanted, find_jsonl, find_shards
from vr_jax.evaluation.types import EvaluationError

_ROWS_AT_ONCE = 64  # of a parquet file; bounds what is held twice


@dataclass(frozen=True)
class Row:
    """One row: its columns without the image, the encoded image(s), and why it is unusable, if it is."""

    id: str  # <split>-<number of the row>, the same in both layouts
    values: Mapping[str, Any]
    images: tuple[Path | bytes, ...] = field(repr=False)
    problem: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table. `read` turns a cell into what the benchmark works with and raises ValueError ("expected
    ..., found ...") or SkipRecord for one that cannot be used. An optional column, or a cell of it, may be absent."""

    name: str
    read: Callable[[Any], Any]
    optional: bool = False


def text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"expected a text, found {_kind(cell)}")
    return cell


def texts(cell: Any) -> tuple[str, ...]:
    """A list of texts, or one text."""
    cells = [cell] if isinstance(cell, str) else cell
    if not isinstance(cells, list | tuple) or not all(isinstance(one, str) for one in cells):
        raise ValueError(f"expected a text or a list of texts, found {_kind(cell)}")
    return tuple(cells)


def answers(cell: Any) -> tuple[str, ...]:
    """References: at least one text."""
    found = texts(cell)
    if not found:
        raise SkipRecord("no_answer", "the list of answers is empty")
    return found


def integer(cell: Any) -> int:
    """A whole number, or a text that says one."""
    try:
        if isinstance(cell, int | str) and not isinstance(cell, bool):
            return int(cell)
    except ValueError:
        pass
    raise ValueError(f"expected a whole number, found {cell if isinstance(cell, str) else _kind(cell)!r}")


def anything(cell: Any) -> Any:
    return cell


def _kind(cell: Any) -> str:
    return "nothing" if cell is None else type(cell).__name__


def image_column(values: Mapping[str, Any]) -> Sequence[str]:
    return ("image",)


def read_rows(
    data: Path,
    wanted: Wanted,
    columns: Sequence[Column],
    *,
    image_columns: Sequence[str] = ("image",),
    images_at: Callable[[Mapping[str, Any]], Sequence[str]] = image_column,
    images: Callable[[Mapping[str, Any]], Path | bytes] | None = None,
) -> list[Row]:
    """All rows of `<split>.jsonl` (image names relative to its folder), or of the published parquet files (images
    inside); see `files`. A row that lacks a column or an image gets a `problem`. Equal images share their bytes.

    image_columns: may hold images, the first must be there. images_at: the columns that hold the images of a row,
    in order, given its values. images: where the parquet files hold no images, gives that of a record, or raises
    SkipRecord.
    Raises EvaluationError if there is no such file, it cannot be read, lacks columns, or has no rows."""
    required = [column.name for column in columns if not column.optional]
    jsonl = find_jsonl(data, wanted)
    records: Iterable[Any]
    if jsonl is not None:
        records = list(_jsonl_records(jsonl))
        _require_columns(jsonl, records, [*required, image_columns[0]])
        folder = ImageFolder(jsonl.parent)
    else:
        records = _published_records(data, wanted, columns, image_columns, images)
        folder = ImageFolder(None)
    pool: dict[bytes, bytes] = {}
    rows = [
        _row(f"{wanted.split}-{number:05d}", record, folder, columns, images_at, pool)
        for number, record in enumerate(records)
    ]
    if not rows:
        raise EvaluationError(f"{data}: split {wanted.split!r} has no rows")
    return rows


def _row(
    row_id: str,
    record: Any,
    folder: ImageFolder,
    columns: Sequence[Column],
    images_at: Callable[[Mapping[str, Any]], Sequence[str]],
    pool: dict[bytes, bytes],
) -> Row:
    if not isinstance(record, Mapping):
        return Row(row_id, {}, (), f"malformed_record: {record}")
    values: dict[str, Any] = {}
    images: list[Path | bytes] = []
    problems: list[SkipRecord] = []
    for column in columns:
        try:
            cell = record.get(column.name)
            if not (cell is None and column.optional):
                values[column.name] = column.read(cell)
        except ValueError as error:
            problems.append(SkipRecord("malformed_record", f"{column.name}: {error}"))
        except SkipRecord as error:
            problems.append(error)
    try:
        if not problems:
            images = [image for name in images_at(values) for image in _images(record, name, folder)]
            if not images:
                raise SkipRecord("missing_image", "the row has no image")
    except SkipRecord as error:
        problems.append(error)
    if problems:
        return Row(row_id, values, (), str(problems[0]))
    return Row(row_id, values, tuple(pool.setdefault(one, one) if isinstance(one, bytes) else one for one in images))


def _images(record: Mapping[str, Any], name: str, folder: ImageFolder) -> tuple[Path | bytes, ...]:
    if isinstance(record.get(name), SkipRecord):
        raise record[name]
    found = images_of({"image": record.get(name)}, folder)
    if not found and name != "image":
        raise SkipRecord("missing_image", f"{name}: the row has no such image")
    return found


def _jsonl_records(path: Path) -> Iterator[Any]:
    """Raw records; a text instead of a record says what is wrong with it."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            yield f"{path.name}, line {number}: {error}"
        else:
            found = f"{path.name}, line {number}: expected an object, found {_kind(record)}"
            yield record if isinstance(record, dict) else found


def _require_columns(path: Path, records: Sequence[Any], required: Sequence[str]) -> None:
    """A column that some rows lack is these rows' problem; one that all lack is none of this benchmark's files."""
    found = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
    missing = [name for name in required if name not in found]
    if found and missing:
        raise EvaluationError(f"{path}: every row lacks column(s) {missing}; found columns {list(found)[:50]}")


def _published_records(
    data: Path,
    wanted: Wanted,
    columns: Sequence[Column],
    image_columns: Sequence[str],
    images: Callable[[Mapping[str, Any]], Path | bytes] | None,
) -> Iterator[Any]:
    required = [column.name for column in columns if not column.optional]
    if images is None:
        required.append(image_columns[0])
    optional = [column.name for column in columns if column.optional] + list(image_columns)
    for path in find_shards(data, wanted, required):
        for record in parquet_records(path, required, optional):
            if images is not None and isinstance(record, dict) and record.get("image") is None:
                try:
                    record["image"] = images(record)
                except SkipRecord as error:
                    record["image"] = error
            yield record


def parquet_records(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Any]:
    """The rows of a parquet file with the named columns, a few at a time; a text instead of a row says what is wrong
    with it. Raises EvaluationError if it cannot be read or lacks a required column."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in required if name not in names]:
                raise EvaluationError(f"{path}: no column(s) {missing}; found {names}")
            kept = [name for name in dict.fromkeys((*required, *optional)) if name in names]
            first = 0
            for group in range(file.num_row_groups):  # by itself: else Arrow keeps what it read of the ones before
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=kept):
                    yield from _records(batch, f"{path.name}, row", first)
                    first += batch.num_rows
                pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{path}: not a readable parquet file ({detail})") from error


def _records(batch: pa.RecordBatch, where: str, first: int) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"{where} {first}: {error}"]
    return [record for i in range(batch.num_rows) for record in _records(batch.slice(i, 1), where, first + i)]
