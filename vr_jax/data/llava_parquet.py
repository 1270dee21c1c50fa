"""A source of LLaVA-NeXT-Data: parquet shards that contain the images and are read by row group."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, conversation_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError

COLUMNS = ("id", "image", "conversations")


class LlavaParquetSource:
    """Parquet shards with the columns id, image and conversations; other columns are ignored.

    Reading one record reads its whole row group, so the most recent row groups are cached.

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
        self.paths = [Path(path) for path in paths]
        self.files = self.paths
        self.images = ImageFolder(images, follow_links=follow_links)
        self.cached_groups = cached_groups
        self._groups: list[tuple[int, int]] = []  # The shard and the row group of every block.
        self.blocks: list[int] = []
        self._length = 0
        for shard, path in enumerate(self.paths):
            require_file(path)
            metadata = _parquet_metadata(path)
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
        except (pa.ArrowException, OSError, ValueError) as error:  # Text that is not UTF-8 is a ValueError.
            detail = f"{self.paths[shard]}, row group {group}, row {row} cannot be read: {error}."
            return SkipRecord("malformed_record", detail).as_skip(record_id)
        return conversation_of(record, record_id, self.images)

    def _cache(self) -> Callable[[int], dict[str, Any]]:
        return functools.lru_cache(maxsize=self.cached_groups)(self._read_block)

    def _read_block(self, block: int) -> dict[str, Any]:
        """Returns the columns of a row group."""
        shard, group = self._groups[block]
        with pq.ParquetFile(self.paths[shard]) as file:
            table = file.read_row_group(group, columns=list(COLUMNS))
        return {name: table.column(name).combine_chunks() for name in COLUMNS}

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


def _parquet_metadata(path: Path) -> pq.FileMetaData:
    """Reads the metadata of a shard and checks its columns."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: the file cannot be read as parquet ({error}).") from error
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: the columns {missing} are missing; expected {list(COLUMNS)} as LLaVA-NeXT-Data has them, found "
            f"{schema.names}."
        )
    expected = {
        "id": (_is_id, "a string or an integer"),
        "image": (_is_image, "a struct of bytes and path, bytes, a string, or a list of these"),
        "conversations": (_is_messages, "a list of structs with from and value"),
    }
    for name, (fits, wanted) in expected.items():
        found = schema.field(name).type
        if not fits(found):
            raise UserError(f"{path}: the column {name!r} has the type {found}; expected {wanted}.")
    return metadata


def _is_id(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_integer(found)


def _is_image(found: pa.DataType) -> bool:
    if pa.types.is_list(found) or pa.types.is_large_list(found):
        return _is_image(found.value_type)
    if pa.types.is_struct(found):
        return any(field.name == "bytes" for field in found)
    binary = pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return binary or pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)


def _is_messages(found: pa.DataType) -> bool:
    if not (pa.types.is_list(found) or pa.types.is_large_list(found)) or not pa.types.is_struct(found.value_type):
        return False
    names = {field.name for field in found.value_type}
    return {"from", "value"} <= names or {"role", "content"} <= names
