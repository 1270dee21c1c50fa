"""Conversion of one raw record in LLaVA's schema to a `Conversation`, or to the reason why that is impossible.

A record looks like this (`docs/design/methods.md#data-files`):

    {"id": "7", "image": "a.jpg",
     "conversations": [{"from": "human", "value": "<image> What is this?"}, {"from": "gpt", "value": "A car."}]}

The field `image` may be absent (a text-only sample), be a list, or contain the encoded file as {"bytes": ..., "path":
...}. Messages may also be written as {"role": ..., "content": ...}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vr_jax.data.images import locate
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip, Turn
from vr_jax.errors import UserError

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def require_file(path: Path) -> None:
    """Checks that a data file can be read.

    Raises:
        UserError: The path does not exist, is not a file, or may not be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path of the data.")
    if not path.is_file():
        raise UserError(f"{path}: expected a file, found a folder or another kind of entry.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: there is no permission to read the file.")


class ImageFolder:
    """The folder that the image file names of records are relative to.

    Attributes:
        path: The resolved folder, or None if every record must contain its images.
        follow_links: Whether symbolic links inside the folder may lead out of it.
    """

    def __init__(self, path: str | Path | None, *, follow_links: bool = False):
        """Resolves the folder.

        Raises:
            UserError: The path is not a folder.
        """
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{path}: no such image folder; set `images` to the folder that the image names belong to.")
        self.path = None if path is None else Path(path).resolve()
        self.follow_links = follow_links

    def __call__(self, name: object) -> Path:
        """Returns the path of an image file.

        Raises:
            SkipRecord: The name cannot be used; `vr_jax.data.images.locate` lists the reasons.
        """
        if self.path is None:
            raise SkipRecord(
                "missing_image", f"The record names the image file {name!r}, but no image folder (`images`) is set."
            )
        return locate(self.path, name, follow_links=self.follow_links)


def turns_of(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Reads the messages of a raw record.

    Raises:
        SkipRecord: "malformed_record", "unknown_role" or "empty_conversation".
    """
    messages = record.get("conversations")
    if not isinstance(messages, list):
        raise SkipRecord(
            "malformed_record",
            f"The field 'conversations' is {_kind(messages)}, but must be a list of messages.",
        )
    if not messages:
        raise SkipRecord("empty_conversation", "The list in the field 'conversations' is empty.")
    return tuple(_turn(k, message) for k, message in enumerate(messages))


def _turn(k: int, message: Any) -> Turn:
    """Converts message k of a record."""
    where = f"conversations[{k}]"
    if not isinstance(message, Mapping):
        raise SkipRecord("malformed_record", f"The message {where} is {_kind(message)}, but must be an object.")
    speaker = message.get("from", message.get("role"))
    text = message.get("value", message.get("content"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(map(repr, SPEAKERS))
        detail = f"The message {where} has the speaker {speaker!r}, but it must be one of {known}."
        raise SkipRecord("unknown_role", detail)
    if not isinstance(text, str):
        raise SkipRecord("malformed_record", f"The text of the message {where} is {_kind(text)}, but must be a str.")
    return Turn(SPEAKERS[speaker], text)  # type: ignore[arg-type]  # The values of SPEAKERS are the roles of a Turn.


def images_of(record: Mapping[str, Any], folder: Callable[[object], Path]) -> tuple[Path | bytes, ...]:
    """Reads the images of a raw record.

    Args:
        record: The raw record.
        folder: Turns a file name into a path, as an `ImageFolder` does.

    Returns:
        The encoded bytes of images that the record contains, and the paths of the others.

    Raises:
        SkipRecord: A name cannot be used.
    """
    value = record.get("image")
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(_image(one, folder) for one in values)


def _image(value: Any, folder: Callable[[object], Path]) -> Path | bytes:
    """Converts one image entry of a record."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, bytes) else folder(value)


def conversation_of(record: Any, record_id: str, folder: Callable[[object], Path]) -> Conversation | Skip:
    """Converts a raw record.

    Args:
        record: The raw record as JSON, parquet or array_record files contain it.
        record_id: The name of the sample if the record has no id of its own.
        folder: Turns an image file name into a path.

    Returns:
        The conversation, or a `Skip` that states what is wrong with the record.
    """
    try:
        if not isinstance(record, Mapping):
            raise SkipRecord("malformed_record", f"The record is {_kind(record)}, but must be an object.")
        if isinstance(record.get("id"), str | int) and str(record["id"]):
            record_id = str(record["id"])
        return Conversation(record_id, turns_of(record), images_of(record, folder))
    except SkipRecord as error:
        return error.as_skip(record_id)


def _kind(value: Any) -> str:
    """Describes the type of a value in a message."""
    return "absent" if value is None else f"a value of type {type(value).__name__}"
