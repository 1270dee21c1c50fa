"""One raw record of LLaVA's schema -> Conversation, or the reason why not (methods.md 1.7).

{"id": "...", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}

`image` may be absent (text only), a list, or hold the encoded file ({"bytes": ..., "path": ...}); messages may also be
{"role": ..., "content": ...}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vr_jax.data.images import locate
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip, Turn


class SourceError(ValueError):
    """A data file that cannot be used; the message says which file, where in it, what was found and expected."""


SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def require_file(path: Path) -> None:
    """Raises SourceError unless `path` is a file that may be read."""
    if not path.is_file():
        raise SourceError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if not os.access(path, os.R_OK):
        raise SourceError(f"{path}: no permission to read it")


class ImageFolder:
    """Where the file names of records point to; None if the records must hold their images themselves.

    follow_links: symbolic links inside the folder may point out of it. Raises SourceError if it is no folder."""

    def __init__(self, path: str | Path | None, *, follow_links: bool = False):
        if path is not None and not Path(path).is_dir():
            raise SourceError(f"{path}: no such image folder")
        self.path = None if path is None else Path(path).resolve()
        self.follow_links = follow_links

    def __call__(self, name: Any) -> Path:
        """The file of a name. Raises SkipRecord, see `images.locate`."""
        if self.path is None:
            raise SkipRecord("missing_image", f"{name!r}: the record holds no image and no image folder is set")
        return locate(self.path, name, follow_links=self.follow_links)


def turns_of(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a raw record. Raises SkipRecord "malformed_record", "unknown_role" or "empty_conversation"."""
    messages = record.get("conversations")
    if not isinstance(messages, list):
        raise SkipRecord("malformed_record", f"conversations: expected a list, found {type(messages).__name__}")
    if not messages:
        raise SkipRecord("empty_conversation", "conversations: the list is empty")
    return tuple(_turn(k, message) for k, message in enumerate(messages))


def _turn(k: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise SkipRecord("malformed_record", f"conversations[{k}]: expected an object, found {type(message).__name__}")
    speaker = message.get("from", message.get("role"))
    text = message.get("value", message.get("content"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise SkipRecord("unknown_role", f"conversations[{k}]: {speaker!r}, expected one of {list(SPEAKERS)}")
    if not isinstance(text, str):
        raise SkipRecord("malformed_record", f"conversations[{k}]: expected a text, found {type(text).__name__}")
    return Turn(SPEAKERS[speaker], text)  # type: ignore[arg-type]


def images_of(record: Mapping[str, Any], folder: Callable[[Any], Path]) -> tuple[Path | bytes, ...]:
    """The images of a raw record, as bytes or as what `folder` makes of a file name.

    Raises SkipRecord "malformed_record", or what `folder` raises."""
    value = record.get("image")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(_image(one, folder) for one in values)


def _image(value: Any, folder: Callable[[Any], Path]) -> Path | bytes:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, bytes) else folder(value)


def conversation_of(record: Any, record_id: str, folder: Callable[[Any], Path]) -> Conversation | Skip:
    """A raw record as a Conversation, or as a Skip that says what is wrong; `record_id` names one without id."""
    try:
        if not isinstance(record, Mapping):
            raise SkipRecord("malformed_record", f"expected an object, found {type(record).__name__}")
        if isinstance(record.get("id"), str | int) and str(record["id"]):
            record_id = str(record["id"])
        return Conversation(record_id, turns_of(record), images_of(record, folder))
    except SkipRecord as error:
        return error.as_skip(record_id)
