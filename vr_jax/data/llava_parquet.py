"""LLaVA-NeXT-Data: parquet shards with the images in the rows, read by row group."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.records import ImageFolder, SourceError, conversation_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip

COLUMNS = ("id", "image", "conversations")


class LlavaParquet:
    """Parquet shards of LLaVA-NeXT-Data: columns id, image (struct of bytes and path), conversations, others ignored.

    Reading one record reads its row group; the last `cached_groups` are kept, and `blocks` lets the pipeline shuffle
    groups rather than single records."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        images: str | Path | None = None,
        *,
        follow_links: bool = False,
        cached_groups: int = 5,
    ):
        if not paths:
            raise SourceError("no parquet file given")
        self.paths = [Path(path) for path in paths]
        self.images = ImageFolder(images, follow_links=follow_links)
        self.cached_groups = cached_groups
        self._groups: list[tuple[int, int]] = []  # (shard, row group) of every block
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
        return self._length

    def __getitem__(self, index: int) -> Conversation | Skip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = bisect.bisect_right(self.blocks, index) - 1
        row = index - self.blocks[block]
        shard, group = self._groups[block]
        record_id = f"{self.paths[shard].name}#{index}"
        try:
            record = {name: column[row].as_py() for name, column in self._read(block).items()}
        except (pa.ArrowException, OSError, ValueError) as error:  # also text that is not UTF-8
            reason = SkipRecord("malformed_record", f"{self.paths[shard]}, row {row} of row group {group}: {error}")
            return reason.as_skip(record_id)
        return conversation_of(record, record_id, self.images)

    def _cache(self):
        return functools.lru_cache(maxsize=self.cached_groups)(self._read_block)

    def _read_block(self, block: int) -> dict[str, pa.ChunkedArray]:
        shard, group = self._groups[block]
        with pq.ParquetFile(self.paths[shard]) as file:
            table = file.read_row_group(group, columns=list(COLUMNS))
        return {name: table.column(name).combine_chunks() for name in COLUMNS}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read = self._cache()

    def __repr__(self) -> str:
        return f"LlavaParquet({len(self.paths)} files, {len(self)} records)"


def _parquet_metadata(path: Path) -> pq.FileMetaData:
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not a readable parquet file ({error})") from error
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise SourceError(
            f"{path}: no column(s) {missing}; expected {list(COLUMNS)} (LLaVA-NeXT-Data), found {schema.names}"
        )
    expected = {
        "id": (lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_integer(t), "a string"),
        "image": (_is_image, "a struct of bytes and path, bytes, a string, or a list of these"),
        "conversations": (_is_messages, "a list of structs with from and value"),
    }
    for name, (fits, wanted) in expected.items():
        found = schema.field(name).type
        if not fits(found):
            raise SourceError(f"{path}: column {name!r} is {found}, expected {wanted}")
    return metadata


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
