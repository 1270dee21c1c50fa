"""A source of LLaVA's JSON and JSONL files.

A file is indexed once and then memory-mapped instead of loaded, so that all worker processes share its pages.
"""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int

from vr_jax.data.records import ImageFolder, conversation_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip
from vr_jax.errors import UserError
from vr_jax.storage import Path, RepeatedKey, as_path, on_disk, parse_json

MESSAGE_KEYS = {"conversations", "messages"}  # a record has one of these


class LlavaJsonSource:
    """A JSON list of LLaVA records, or a file with one record per line.

    Attributes:
        path: The data file.
        images: The folder that image names are relative to.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, *, follow_links: bool = False):
        """Finds the position of every record.

        Args:
            path: The data file.
            images: The folder that image names are relative to.
            follow_links: Whether symbolic links inside the image folder may lead out of it.

        Raises:
            UserError: The file or the image folder cannot be read, or the file is not JSON.
        """
        self.path = as_path(path)
        self.images = ImageFolder(images, follow_links=follow_links)
        require_file(self.path)
        self.files = [self.path]
        self._local = on_disk(self.path)  # worker processes map the same copy
        self._ranges = record_ranges(self.path)
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._ranges)

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Parses a record."""
        if self._map is None:
            with self._local.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin, end = self._ranges[index]
        record_id = f"{self.path.name}#{index}"
        try:
            record = parse_json(self._map[begin:end])
        except RepeatedKey as error:
            return SkipRecord("malformed_record", f"The record cannot be read: {error}.").as_skip(record_id)
        except ValueError as error:
            detail = f"{self.path} changed while it was in use: record {index} is no longer JSON ({error})."
            return SkipRecord("malformed_record", detail).as_skip(record_id)
        return conversation_of(record, record_id, self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the memory map, which another process opens for itself."""
        return self.__dict__ | {"_map": None}

    def __repr__(self) -> str:
        """Names the file and the number of records."""
        return f"LlavaJsonSource({str(self.path)!r}, {len(self)} records)"


def record_ranges(path: Path, keys: Collection[str] = MESSAGE_KEYS) -> Int[np.ndarray, "records 2"]:
    """Returns the positions in the file, first byte and last byte plus one, of every record.

    Args:
        path: A JSON list of records, or a file with one record per line.
        keys: A record has one of these keys. An object without them that is alone in its file is no record.

    Raises:
        UserError: The file is not such a text.
    """
    data = on_disk(path).read_bytes()
    start = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, start + error.start) + 1
        packed = " The file is compressed; unpack it first." if data.startswith((b"\x1f\x8b", b"PK\x03\x04")) else ""
        raise UserError(
            f"{path}, line {line}: the text is not UTF-8 ({error.reason}); save it as UTF-8.{packed}"
        ) from error
    del data
    spans = _list_spans(path, text) if text.lstrip()[:1] == "[" else _line_spans(path, text, keys)
    ranges = np.asarray(spans, np.int64).reshape(-1, 2)
    if not text.isascii():
        ranges = _to_bytes(text, ranges)
    return ranges + start


def _list_spans(path: Path, text: str) -> list[tuple[int, int]]:
    """Returns the character positions of the records of a JSON list."""
    decode = json.JSONDecoder().raw_decode
    whitespace = json.decoder.WHITESPACE  # type: ignore[attr-defined]  # The stubs omit this constant.
    spans: list[tuple[int, int]] = []
    position = whitespace.match(text, text.index("[") + 1).end()
    try:
        while text[position : position + 1] != "]" or spans:
            _, end = decode(text, position)
            spans.append((position, end))
            position = whitespace.match(text, end).end()
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']' after a record", text, position)
            position = whitespace.match(text, position + 1).end()
        rest = whitespace.match(text, position + 1).end()
        if rest < len(text):
            raise json.JSONDecodeError("more text after the list", text, rest)
    except (ValueError, RecursionError) as error:  # A number of thousands of digits is a ValueError.
        line = text.count("\n", 0, getattr(error, "pos", position)) + 1
        raise UserError(f"{path}, line {line} (record {len(spans)}): the text is not JSON ({error}).") from error
    return spans


def _line_spans(path: Path, text: str, keys: Collection[str]) -> list[tuple[int, int]]:
    """Returns the character positions of the records of a file with one record per line."""
    spans, position, record = [], 0, None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1:
                    _refuse_object(path, text, keys)
                raise UserError(f"{path}, line {number}: the text is not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, line {number}: expected a list of records or one object per line, found a "
                    f"{type(record).__name__}."
                )
            spans.append((position, position + len(line)))
        position += len(line) + 1
    if len(spans) == 1:
        _refuse_object(path, text, keys)
    return spans


def _refuse_object(path: Path, text: str, known: Collection[str]) -> None:
    """Checks that a text is not one object that holds the records, as some programs write it.

    Raises:
        UserError: The text is such an object.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return
    if isinstance(value, dict) and not value.keys() & set(known):
        keys = ", ".join(f"{key[:40]!r}" for key in list(value)[:5]) + (", ..." if len(value) > 5 else "")
        raise UserError(
            f"{path}: the file is one object with the keys {keys}; expected a list of records, [{{...}}, ...], or one "
            "record per line."
        )


def _to_bytes(text: str, ranges: Int[np.ndarray, "records 2"]) -> Int[np.ndarray, "records 2"]:
    """Converts character positions, which ascend when flattened, to byte positions in the UTF-8 file."""
    edges = [0, *ranges.ravel().tolist()]
    sizes = [len(text[a:b].encode()) for a, b in itertools.pairwise(edges)]
    return np.cumsum(sizes, dtype=np.int64).reshape(-1, 2)
