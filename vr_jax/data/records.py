"""Conversion of one raw record to a `Conversation`, or to the reason why that is impossible.

A record in LLaVA's format looks like this (`docs/design/methods.md#data-files`):

    {"id": "7", "image": "a.jpg",
     "conversations": [{"from": "human", "value": "<image> What is this?"}, {"from": "gpt", "value": "A car."}]}

`vr_jax.data.schema` says what else a record may contain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.data.image_values import image_of
from vr_jax.data.images import locate
from vr_jax.data.messages import turns_and_images
from vr_jax.data.schema import RECORD_KEYS, check_keys, kind, shown
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text
from vr_jax.data.types import Conversation, Skip, Turn
from vr_jax.errors import UserError
from vr_jax.storage import Path, as_path, is_local

# A longer id would be repeated in logs and checkpoints; it is a mistake, such as a whole text in the wrong field.
_LONGEST_ID = 256
_ABSENT = "The field 'conversations' is absent, and so is 'messages'; a record must have one of them."
_QUESTION = " It is a question: these are for a metric of config.validation and for `vr-jax eval`, and have no loss."


def require_file(path: Path) -> None:
    """Checks that a data file can be read.

    Raises:
        UserError: The path does not exist, is not a file, or may not be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path of the data.")
    if not path.is_file():
        raise UserError(f"{path}: expected a file, found a folder or another kind of entry.")
    if is_local(path) and not os.access(path, os.R_OK):
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
        if path is not None and not as_path(path).is_dir():
            raise UserError(f"{path}: no such image folder; set `images` to the folder that the image names belong to.")
        self.path = None if path is None else as_path(path).resolve()
        self.follow_links = follow_links

    def __call__(self, name: object) -> Path:
        """Returns the path of an image file.

        Raises:
            SkipRecord: The name cannot be used; `vr_jax.data.images.locate` lists the reasons.
        """
        if self.path is None:
            raise SkipRecord(
                "missing_image",
                f"The record names the image file {shown(name)}, but no image folder (`images`) is set.",
            )
        return locate(self.path, name, follow_links=self.follow_links)


def conversation_of(record: Any, record_id: str, folder: Callable[[object], Path]) -> Conversation | Skip:
    """Converts a raw record.

    Args:
        record: The raw record as JSON, parquet or array_record files contain it; see `vr_jax.data.schema.Record`.
        record_id: The name of the sample if the record has no usable id of its own.
        folder: Turns an image file name into a path, as an `ImageFolder` does.

    Returns:
        The conversation, or a `Skip` that states what is wrong with the record.
    """
    try:
        if not isinstance(record, Mapping):
            raise SkipRecord("malformed_record", f"The record is {kind(record)}, but must be an object.")
        record_id = _id(record.get("id"), record_id)
        images, images_name = _images(record)
        messages_name, messages = _one_of(record, ("conversations", "messages"))
        if messages is None:
            raise SkipRecord("malformed_record", _ABSENT + (_QUESTION if record.get("question") is not None else ""))
        turns, found = turns_and_images(messages, messages_name, images, images_name, folder)
        check_keys(record, RECORD_KEYS, "The record", names_files=not found)
        return Conversation(record_id, _with_system(turns, record.get("system")), found)
    except SkipRecord as error:
        return error.as_skip(record_id)


def _id(value: Any, otherwise: str) -> str:
    """Returns the id of a record as a text of one printable line, or else the name that the source gives it."""
    if not isinstance(value, str | int):
        return otherwise
    text = str(value)
    return text if text.isprintable() and 0 < len(text) <= _LONGEST_ID else otherwise


def _one_of(record: Mapping[str, Any], keys: tuple[str, str]) -> tuple[str, Any]:
    """Returns the name and the value of whichever field is there, which is None if neither is.

    Raises:
        SkipRecord: Both are there and differ.
    """
    first, second = (record.get(key) for key in keys)
    if first is not None and second is not None and first != second:
        detail = f"The record has both {keys[0]!r} and {keys[1]!r} with different values; keep one of them."
        raise SkipRecord("malformed_record", detail)
    return (keys[0], first) if second is None else (keys[1], second)


def _images(record: Mapping[str, Any]) -> tuple[list[Any], str]:
    """Returns the record's own list of images, and the name of the field."""
    listed = {}
    for key in ("image", "images"):
        value = record.get(key)
        if value is not None:
            listed[key] = list(value) if isinstance(value, list | tuple) else [value]
    name, value = _one_of({key: value for key, value in listed.items() if value}, ("image", "images"))
    return value or [], name


def images_of(record: Mapping[str, Any], folder: Callable[[object], Path]) -> tuple[Path | bytes, ...]:
    """Reads the images that a record lists itself, which need not have messages.

    Args:
        record: The raw record.
        folder: Turns a file name into a path, as an `ImageFolder` does.

    Returns:
        The encoded bytes of images that the record contains, and the paths of the others.

    Raises:
        SkipRecord: An image cannot be used.
    """
    images, name = _images(record)
    return tuple(image_of(one, name, folder) for one in images)


def _with_system(turns: tuple[Turn, ...], text: Any) -> tuple[Turn, ...]:
    """Puts the text of the field `system` in front of the turns."""
    if text is None or text == "":
        return turns
    first = Turn("system", check_text(text, "The field 'system'"))
    if turns[0].role != "system":
        return (first, *turns)
    if turns[0] != first:
        raise SkipRecord(
            "malformed_record",
            "The record has a system text both in the field 'system' and as its first message; keep one of them.",
        )
    return turns
