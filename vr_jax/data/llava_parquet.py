"""A source of LLaVA-NeXT-Data: parquet shards that contain the images and are read by row group."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, conversation_of, require_file
from vr_jax.data.schema import IMAGE_KEYS, RECORD_KEYS, describes_content
from vr_jax.data.skips import SkipRecord, one_line
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError
from vr_jax.storage import Path, as_path, for_library

IMAGE_COLUMNS = ("image", "images")
MESSAGE_COLUMNS = ("conversations", "messages")
# A damaged file raises one of these. Text that is not UTF-8 is a ValueError, and a row that is absent a LookupError.
READ_ERRORS: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, LookupError)


class LlavaParquetSource:
    """Parquet shards with a column `conversations` or `messages`, and mostly `id` and `image`.

    A row is a record as `vr_jax.data.schema.Record` describes it, with the columns as its keys. Reading one record
    reads its whole row group, so the most recent row groups are cached.

    Attributes:
        paths: The shards in order.
        images: The folder of images that the rows only name.
        cached_groups: The number of row groups that stay in memory.
        blocks: The index of the first record of each row group.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        images: str | Path | None = None,
        *,
        follow_links: bool = False,
        cached_groups: int = 5,
    ):
        """Reads the metadata of all shards.

        Args:
            paths: The shards in order.
            images: The folder of images that the rows only name.
            follow_links: Whether symbolic links inside the image folder may lead out of it.
            cached_groups: The number of row groups that stay in memory.

        Raises:
            UserError: There are no shards, or one is not a parquet file with the expected columns.
        """
        if not paths:
            raise UserError("There is no parquet file in the data path; check the folder or the pattern.")
        self.paths = [as_path(path) for path in paths]
        self.files = self.paths
        self.images = ImageFolder(images, follow_links=follow_links)
        self.cached_groups = cached_groups
        self._groups: list[tuple[int, int]] = []  # The shard and the row group of every block.
        self._columns: list[list[str]] = []  # The columns to read of every shard.
        self.blocks: list[int] = []
        self._length = 0
        for shard, path in enumerate(self.paths):
            require_file(path)
            metadata, columns = _parquet_metadata(path)
            self._columns.append(columns)
            for group in range(metadata.num_row_groups):
                self._groups.append((shard, group))
                self.blocks.append(self._length)
                self._length += metadata.row_group(group).num_rows
        self._read = self._cache()

    def __len__(self) -> int:
        """Returns the number of records of all shards."""
        return self._length

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Reads a record, and its row group unless that is cached.

        Raises:
            IndexError: There is no record with this index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: {self!r} has records 0..{len(self) - 1}")
        block = bisect.bisect_right(self.blocks, index) - 1
        row = index - self.blocks[block]
        shard, group = self._groups[block]
        record_id = f"{self.paths[shard].name}#{index}"
        try:
            record = {name: column[row].as_py() for name, column in self._read(block).items()}
        except READ_ERRORS as error:
            detail = f"{self.paths[shard]}, row group {group}, row {row} cannot be read: {error}."
            return SkipRecord("malformed_record", detail).as_skip(record_id)
        return conversation_of(record, record_id, self.images)

    def _cache(self) -> Callable[[int], dict[str, Any]]:
        return functools.lru_cache(maxsize=self.cached_groups)(self._read_block)

    def _read_block(self, block: int) -> dict[str, Any]:
        """Returns the columns of a row group."""
        shard, group = self._groups[block]
        with pq.ParquetFile(for_library(self.paths[shard])) as file:
            table = file.read_row_group(group, columns=self._columns[shard])
        return {name: table.column(name) for name in self._columns[shard]}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the cache."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with an empty cache."""
        self.__dict__.update(state)
        self._read = self._cache()

    def __repr__(self) -> str:
        """States the number of shards and of records."""
        return f"LlavaParquetSource({len(self.paths)} files, {len(self)} records)"


def _parquet_metadata(path: Path) -> tuple[pq.FileMetaData, list[str]]:
    """Reads the metadata of a shard, checks its columns, and chooses those to read."""
    try:
        with pq.ParquetFile(for_library(path)) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except READ_ERRORS as error:
        raise UserError(f"{path}: the file cannot be read as parquet ({one_line(str(error), 200)}).") from error
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: several columns have the name {', '.join(map(repr, repeated))}; rename them.")
    if not any(name in schema.names for name in MESSAGE_COLUMNS):
        raise UserError(
            f"{path}: the columns {' and '.join(map(repr, MESSAGE_COLUMNS))} are missing; expected one of them as "
            f"LLaVA-NeXT-Data has it, found {schema.names}."
        )
    expected = {
        **dict.fromkeys(IMAGE_COLUMNS, (_is_image, "a struct of bytes and path, bytes, a string or a list")),
        **dict.fromkeys(MESSAGE_COLUMNS, (_is_messages, "a list of structs with from and value, or role and content")),
        "system": (_is_text, "a string"),
    }
    for name, (fits, wanted) in expected.items():
        found = schema.field(name).type if name in schema.names else pa.null()
        if not fits(found):
            raise UserError(f"{path}: the column {name!r} has the type {found}; expected {wanted}.")
    return metadata, _columns(schema)


def _columns(schema: pa.Schema) -> list[str]:
    """Chooses the columns to read: those with a meaning, and those that `check_keys` may have to refuse.

    Others, such as metadata and embeddings, are not read.
    """
    without_images = not any(name in schema.names for name in IMAGE_COLUMNS)
    return [
        name
        for name in schema.names
        if name in RECORD_KEYS
        or describes_content(name)
        or _has_bytes(schema.field(name).type)
        or (without_images and _is_text(schema.field(name).type))
    ]


def _plain(found: pa.DataType) -> pa.DataType:
    """Returns the type of the values of a column, which may be stored through a dictionary."""
    return found.value_type if pa.types.is_dictionary(found) else found


def _is_text(found: pa.DataType) -> bool:
    found, types = _plain(found), pa.types
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found) or types.is_null(found)


def _is_bytes(found: pa.DataType) -> bool:
    found, types = _plain(found), pa.types
    sized = types.is_binary(found) or types.is_large_binary(found) or types.is_fixed_size_binary(found)
    return sized or types.is_binary_view(found)


def _is_list(found: pa.DataType) -> bool:
    types = pa.types
    lists = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    return lists or types.is_list_view(found) or types.is_large_list_view(found)


def _is_image(found: pa.DataType) -> bool:
    if _is_list(found):
        return _is_image(found.value_type)
    if pa.types.is_struct(found):
        return any(field.name in IMAGE_KEYS for field in found)
    return _is_bytes(found) or _is_text(found)


def _is_messages(found: pa.DataType) -> bool:
    if pa.types.is_null(found):
        return True
    if _is_list(found):
        return pa.types.is_null(found.value_type) or _is_message(found.value_type)
    return _is_message(found) and all(_is_list(field.type) for field in found)


def _is_message(found: pa.DataType) -> bool:
    names = {field.name for field in found} if pa.types.is_struct(found) else set()
    return bool(names & {"from", "role"}) and bool(names & {"value", "content"})


def _has_bytes(found: pa.DataType) -> bool:
    """Returns whether values of a type contain bytes."""
    if _is_list(found):
        return _has_bytes(found.value_type)
    return any(_has_bytes(field.type) for field in found) if pa.types.is_struct(found) else _is_bytes(found)
