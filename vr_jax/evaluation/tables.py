"""The rows of a benchmark, read from parquet files as published on the Hugging Face hub, or from JSONL with images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, images_of
from vr_jax.data.skips import SkipRecord
from vr_jax.errors import UserError
from vr_jax.evaluation.files import Wanted, find_jsonl, find_shards
from vr_jax.storage import Path, for_library, parse_json

# The number of rows that are converted at a time. The converted rows are a second copy of their images.
_ROWS_AT_ONCE = 64
# The columns with the reference answers, which the published rows of a test split lack, and how they lack them.
_REFERENCES = ("answer", "answers")
_LACKING = (None, "", "?")


@dataclass(frozen=True)
class Row:
    """One row of a benchmark.

    Attributes:
        id: The id `<split>-<number of the row>`, which is the same in both file layouts.
        values: The values of the columns, without the images.
        images: The encoded images, or the paths of their files.
        problem: The reason why the row cannot be used, as "<reason>: <detail>", or None.
        labelled: Whether the split has reference answers.
    """

    id: str
    values: Mapping[str, Any]
    images: tuple[Path | bytes, ...] = field(repr=False)
    problem: str | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Column:
    """A column of a benchmark's table.

    Attributes:
        name: The name of the column.
        read: The function that converts a cell to the value that the benchmark uses. It raises ValueError ("expected
            ..., found ...") or SkipRecord for a cell that cannot be used.
        optional: Whether the column, or a cell of it, may be absent.
    """

    name: str
    read: Callable[[Any], Any]
    optional: bool = False


def text(cell: Any) -> str:
    """Reads a cell that holds a text.

    Raises:
        ValueError: The cell holds something else.
    """
    if not isinstance(cell, str):
        raise ValueError(f"expected a text, found {_kind(cell)}")
    return cell


def texts(cell: Any) -> tuple[str, ...]:
    """Reads a cell that holds a list of texts, or one text.

    Raises:
        ValueError: The cell holds something else.
    """
    cells = [cell] if isinstance(cell, str) else cell
    if not isinstance(cells, list | tuple) or not all(isinstance(one, str) for one in cells):
        raise ValueError(f"expected a text or a list of texts, found {_kind(cell)}")
    return tuple(cells)


def answers(cell: Any) -> tuple[str, ...]:
    """Reads a cell that holds reference answers.

    Raises:
        ValueError: The cell holds something else.
        SkipRecord: The list of answers is empty.
    """
    found = texts(cell)
    if not found:
        raise SkipRecord("no_answer", "the list of answers is empty")
    return found


def integer(cell: Any) -> int:
    """Reads a cell that holds a whole number, or the text of one.

    Raises:
        ValueError: The cell holds something else.
    """
    try:
        if isinstance(cell, int | str) and not isinstance(cell, bool):
            return int(cell)
    except ValueError:
        pass
    raise ValueError(f"expected a whole number, found {cell if isinstance(cell, str) else _kind(cell)!r}")


def anything(cell: Any) -> Any:
    """Reads a cell as it is."""
    return cell


def _kind(cell: Any) -> str:
    return "nothing" if cell is None else type(cell).__name__


def image_column(values: Mapping[str, Any]) -> Sequence[str]:
    """Returns the columns with the images of a row in a table that has one image column."""
    del values
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
    """Reads all rows of a split.

    The rows come from `<split>.jsonl`, where images are file names relative to its folder, or from the published
    parquet files, which contain the images. A row that lacks a column or an image gets a `problem`. Where no row has a
    reference answer, as in a test split whose answers are not published, no row is `labelled`, and that is no problem.
    Equal images share their bytes.

    Args:
        data: The folder of the files, or one file.
        wanted: The split and the names of its files.
        columns: The columns to read.
        image_columns: The columns that may hold images. The first of them must be there.
        images_at: The function that returns the columns with the images of a row, in order, given the row's values.
        images: The function that returns the image of a record where the parquet files hold no images. It raises
            SkipRecord if there is none.

    Raises:
        UserError: There are no files, or they cannot be read, lack columns, or have no rows.
    """
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
    read = [
        _row(f"{wanted.split}-{number:05d}", record, folder, columns, images_at, pool)
        for number, record in enumerate(records)
    ]
    if not read:
        raise UserError(f"{data}: the split {wanted.split!r} has no rows")
    usable = [row for row, _ in read if row.problem is None]
    if usable and not any(row.labelled for row in usable):
        return [_without_references(row) for row, _ in read]
    return [
        replace(row, images=(), problem=lacking, labelled=True) if lacking else replace(row, labelled=True)
        for row, lacking in read
    ]


def _without_references(row: Row) -> Row:
    values = {name: value for name, value in row.values.items() if name not in _REFERENCES}
    return replace(row, values=values, labelled=False)


def _has_references(record: Mapping[str, Any], columns: Sequence[Column]) -> bool:
    """Returns whether a record has reference answers, as far as the benchmark has columns for them."""
    cells = [record.get(column.name) for column in columns if column.name in _REFERENCES]
    return not cells or any(not _is_lacking(cell) for cell in cells)


def _is_lacking(cell: Any) -> bool:
    if isinstance(cell, list | tuple):
        return all(map(_is_lacking, cell))
    return cell is None or (isinstance(cell, str) and cell.strip() in _LACKING)


def _row(
    row_id: str,
    record: Any,
    folder: ImageFolder,
    columns: Sequence[Column],
    images_at: Callable[[Mapping[str, Any]], Sequence[str]],
    pool: dict[bytes, bytes],
) -> tuple[Row, str | None]:
    """Returns a row, and the problem that it has if other rows of the split have reference answers but it has none."""
    if not isinstance(record, Mapping):
        return Row(row_id, {}, (), f"malformed_record: {record}"), None
    values: dict[str, Any] = {}
    images: list[Path | bytes] = []
    problems: list[SkipRecord] = []
    lacking: list[SkipRecord] = []
    labelled = _has_references(record, columns)
    for column in columns:
        try:
            cell = record.get(column.name)
            if not (cell is None and column.optional):
                values[column.name] = column.read(cell)
        except (ValueError, SkipRecord) as error:
            problem = error
            if not isinstance(problem, SkipRecord):
                problem = SkipRecord("malformed_record", f"{column.name}: {error}")
            (lacking if column.name in _REFERENCES and not labelled else problems).append(problem)
    lacks = str(lacking[0]) if lacking and not problems else None
    try:
        if not problems:
            images = [image for name in images_at(values) for image in _images(record, name, folder)]
            if not images:
                raise SkipRecord("missing_image", "the row has no image")
    except SkipRecord as error:
        problems.append(error)
    if problems:
        return Row(row_id, values, (), str(problems[0]), labelled), lacks
    shared = tuple(pool.setdefault(one, one) if isinstance(one, bytes) else one for one in images)
    return Row(row_id, values, shared, None, labelled), lacks


def _images(record: Mapping[str, Any], name: str, folder: ImageFolder) -> tuple[Path | bytes, ...]:
    if isinstance(record.get(name), SkipRecord):
        raise record[name]
    found = images_of({"image": record.get(name)}, folder)
    if not found and name != "image":
        raise SkipRecord("missing_image", f"{name}: the row has no such image")
    return found


def _jsonl_records(path: Path) -> Iterator[Any]:
    """Yields the raw records. A text in the place of a record says what is wrong with its line."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:  # The line is not JSON, or not UTF-8.
            yield f"{path.name}, line {number}: {error}"
        else:
            found = f"{path.name}, line {number}: expected an object, found {_kind(record)}"
            yield record if isinstance(record, dict) else found


def _require_columns(path: Path, records: Sequence[Any], required: Sequence[str]) -> None:
    """Raises UserError if all rows lack a column, which means that the file is not of this benchmark.

    A column that only some rows lack is a problem of these rows.
    """
    found = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
    missing = [name for name in required if name not in found]
    if found and missing:
        raise UserError(f"{path}: every row lacks the columns {missing}; found the columns {list(found)[:50]}")


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
    """Yields the rows of a parquet file, a few of which are held at a time.

    Args:
        path: The file.
        required: The columns that must be there.
        optional: The columns that are read if they are there.

    Yields:
        A row as a dictionary, or a text that says what is wrong with the row.

    Raises:
        UserError: The file cannot be read, or lacks a required column.
    """
    try:
        with pq.ParquetFile(for_library(path)) as file:
            names = file.schema_arrow.names
            if missing := [name for name in required if name not in names]:
                raise UserError(f"{path}: the columns {missing} are missing; found {names}")
            kept = [name for name in dict.fromkeys((*required, *optional)) if name in names]
            first = 0
            # Row groups are read one by one: in a single pass, Arrow keeps all groups that it has read in memory.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=kept):
                    yield from _records(batch, f"{path.name}, row", first)
                    first += batch.num_rows
                pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable parquet file ({detail}); download it again") from error


def _records(batch: pa.RecordBatch, where: str, first: int) -> list[Any]:
    """Converts a batch to rows. If a text is not UTF-8, the rows are converted one by one to find its row."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"{where} {first}: {error}"]
    return [record for i in range(batch.num_rows) for record in _records(batch.slice(i, 1), where, first + i)]
