"""LLaVA's JSON and JSONL files: indexed once, mapped rather than loaded, so that workers share the page cache."""

from __future__ import annotations

import itertools
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from vr_jax.data.records import ImageFolder, SourceError, conversation_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip


class LlavaJson:
    """A JSON list or JSONL file of LLaVA records; image names are relative to `images`.

    follow_links: symbolic links inside the image folder may point out of it."""

    def __init__(self, path: str | Path, images: str | Path | None = None, *, follow_links: bool = False):
        self.path = Path(path)
        self.images = ImageFolder(images, follow_links=follow_links)
        require_file(self.path)
        self._ranges = _record_ranges(self.path)
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> Conversation | Skip:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin, end = self._ranges[index]
        record_id = f"{self.path.name}#{index}"
        try:
            record = json.loads(self._map[begin:end])
        except ValueError as error:
            return SkipRecord("malformed_record", f"{self.path} changed while it was in use: {error}").as_skip(
                record_id
            )
        return conversation_of(record, record_id, self.images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def __repr__(self) -> str:
        return f"LlavaJson({str(self.path)!r}, {len(self)} records)"


def _record_ranges(path: Path) -> np.ndarray:
    """(records, 2) first and last + 1 byte of every record of a JSON list or of a file with one object per line."""
    data = path.read_bytes()
    start = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, start + error.start) + 1
        raise SourceError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    del data
    spans = _list_spans(path, text) if text.lstrip()[:1] == "[" else _line_spans(path, text)
    ranges = np.asarray(spans, np.int64).reshape(-1, 2)
    if not text.isascii():
        ranges = _to_bytes(text, ranges)
    return ranges + start


def _list_spans(path: Path, text: str) -> list[tuple[int, int]]:
    decode, whitespace = json.JSONDecoder().raw_decode, json.decoder.WHITESPACE  # type: ignore[attr-defined]
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
    except (json.JSONDecodeError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "pos", position)) + 1
        raise SourceError(f"{path}, line {line} (record {len(spans)}): not JSON ({error})") from error
    return spans


def _line_spans(path: Path, text: str) -> list[tuple[int, int]]:
    spans, position = [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise SourceError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise SourceError(
                    f"{path}, line {number}: expected a list of records, or one object per line, "
                    f"found a {type(record).__name__}"
                )
            spans.append((position, position + len(line)))
        position += len(line) + 1
    return spans


def _to_bytes(text: str, ranges: np.ndarray) -> np.ndarray:
    """Character positions (ascending when flattened) as positions in the UTF-8 file."""
    edges = [0, *ranges.ravel().tolist()]
    sizes = [len(text[a:b].encode()) for a, b in itertools.pairwise(edges)]
    return np.cumsum(sizes, dtype=np.int64).reshape(-1, 2)
