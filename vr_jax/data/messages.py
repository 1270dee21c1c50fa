"""Conversion of the messages of a record to turns, and of the images that they mention to a list in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vr_jax.data.image_values import image_of
from vr_jax.data.schema import IMAGE_KEYS, MESSAGE_KEYS, SPEAKERS, check_keys, kind, shown
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text, place_images
from vr_jax.data.types import IMAGE, Part, Speaker, Turn
from vr_jax.storage import Path

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
# Keys of a part that say how another program shows or stores it.
_PART_NOTES = ("detail", "cache_control", "annotations")


@dataclass(frozen=True)
class _Source:
    """The place of an image in a message.

    Attributes:
        value: The image that the part itself contains or names, or None.
        where: The name of the part, for messages.
        index: The number of the image in the record's list if the part says it.
    """

    where: str
    value: Any = None
    index: int | None = None


@dataclass(frozen=True)
class _Message:
    """A message whose content is a text with placeholders, or parts.

    Attributes:
        where: The name of the message.
        role: The speaker.
        text: The content if it is a text, else None.
        parts: The content if it consists of parts.
    """

    where: str
    role: Speaker
    text: str | None
    parts: tuple[str | _Source, ...] = field(default=())


def turns_and_images(
    messages: Any,
    name: str,
    images: Sequence[Any],
    images_name: str,
    folder: Callable[[object], Path],
) -> tuple[tuple[Turn, ...], tuple[Path | bytes, ...]]:
    """Reads the messages of a record.

    A user's content that is a text may contain LLaVA's placeholder `<image>`; `place_images` says which of them are
    placeholders. Texts of the assistant, of the system and among parts have no placeholders. A part of an image that
    contains no image stands for the next one of the record's list.

    Args:
        messages: The messages as the record contains them.
        name: The key that contains them.
        images: The record's list of images.
        images_name: The key that contains the list.
        folder: Turns a file name into a path.

    Returns:
        The turns, and their images in order. Images that no message mentions stand at the end.

    Raises:
        SkipRecord: A message is malformed, or the order of the speakers is wrong.
    """
    if isinstance(messages, Mapping):
        messages = _rows(messages, name)
    if not isinstance(messages, list):
        detail = f"The field {name!r} is {kind(messages)}, but must be a list of messages."
        raise SkipRecord("malformed_record", detail)
    if not messages:
        raise SkipRecord("empty_conversation", f"The list in the field {name!r} is empty.")
    read = [_message(one, f"{name}[{k}]") for k, one in enumerate(messages)]
    _check_order(read)

    sources = [part for one in read for part in one.parts if isinstance(part, _Source)]
    without_value = sum(part.value is None for part in sources)
    asking = [one for one in read if one.text is not None and one.role == "user"]
    placed = iter(place_images([one.text or "" for one in asking], max(0, len(images) - without_value)))
    parts = [
        next(placed) if one.text is not None and one.role == "user" else one.parts if one.text is None else (one.text,)
        for one in read
    ]
    found = _Images(images, images_name, sources, folder)
    turns = tuple(Turn(one.role, *found.taken(content)) for one, content in zip(read, parts, strict=True))
    return turns, found.all()


class _Images:
    """Collects the images of a record in the order in which its messages mention them."""

    def __init__(
        self, images: Sequence[Any], name: str, sources: Sequence[_Source], folder: Callable[[object], Path]
    ) -> None:
        self._found: list[Path | bytes] = []
        self._images, self._name, self._folder = images, name, folder
        chosen = [part.index for part in sources if part.value is None and part.index is not None]
        if max(chosen, default=-1) >= len(images):
            detail = f"A part has the index {max(chosen)}, but the field {name!r} has {len(images)} image(s)."
            raise SkipRecord("image_count", detail)
        if len(set(chosen)) < len(chosen):
            raise SkipRecord("image_count", f"Several parts have the same index of {name!r}: {shown(chosen)}.")
        self._rest = iter([k for k in range(len(images)) if k not in chosen])

    def taken(self, content: Sequence[Part | _Source]) -> Iterator[Part]:
        """Yields the parts of a message and keeps their images."""
        for part in content:
            if isinstance(part, _Source) and part.value is not None:
                self._found.append(image_of(part.value, part.where, self._folder))
            elif part is IMAGE or isinstance(part, _Source):
                index = part.index if isinstance(part, _Source) else None
                index = next(self._rest, None) if index is None else index
                if index is not None:
                    self._take(index)
            yield IMAGE if isinstance(part, _Source) else part

    def all(self) -> tuple[Path | bytes, ...]:
        """Returns the images, those that no message mentions at the end."""
        for index in self._rest:
            self._take(index)
        return tuple(self._found)

    def _take(self, index: int) -> None:
        where = self._name if len(self._images) == 1 else f"{self._name}[{index}]"
        self._found.append(image_of(self._images[index], where, self._folder))


def _rows(columns: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Turns a struct of lists into a list of structs. Hugging Face datasets store a sequence of structs as the former.

    Raises:
        SkipRecord: The lists differ in length.
    """
    lists = {key: value for key, value in columns.items() if value is not None}
    if not lists or not all(isinstance(value, list) for value in lists.values()):
        raise SkipRecord("malformed_record", f"The field {name!r} is an object, but must be a list of messages.")
    if len({len(value) for value in lists.values()}) > 1:
        lengths = ", ".join(f"{key!r} {len(value)}" for key, value in lists.items())
        raise SkipRecord("malformed_record", f"The lists in the field {name!r} differ in length: {lengths}.")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _message(message: Any, where: str) -> _Message:
    """Reads one message."""
    if not isinstance(message, Mapping):
        raise SkipRecord("malformed_record", f"The message {where} is {kind(message)}, but must be an object.")
    check_keys(message, MESSAGE_KEYS, f"The message {where}")
    speaker = _either(message, ("from", "role"), where)
    known = speaker.strip().lower() if isinstance(speaker, str) else ""
    if known not in SPEAKERS:
        names = ", ".join(map(repr, SPEAKERS))
        detail = f"The message {where} has the speaker {shown(speaker)}, but it must be one of {names}."
        raise SkipRecord("unknown_role", detail)
    role = SPEAKERS[known]
    content = _either(message, ("value", "content"), where)
    if not isinstance(content, list) or message.get("value") is not None:  # LLaVA's format has no parts.
        return _Message(where, role, check_text(content, f"The text of the message {where}"))
    parts = tuple(_part(part, f"{where}[{k}]") for k, part in enumerate(content))
    if role == "system" and any(isinstance(part, _Source) for part in parts):
        raise SkipRecord("malformed_record", f"The message {where} is the system's, which cannot have images.")
    return _Message(where, role, None, parts)


def _either(message: Mapping[str, Any], keys: tuple[str, str], where: str) -> Any:
    """Returns the value of whichever key is there."""
    first, second = (message.get(key) for key in keys)
    if first is not None and second is not None and first != second:
        detail = f"The message {where} has both {keys[0]!r} and {keys[1]!r} with different values; keep one of them."
        raise SkipRecord("malformed_record", detail)
    return second if first is None else first


def _part(part: Any, where: str) -> str | _Source:
    """Reads one part of a message's content."""
    if isinstance(part, str):
        return check_text(part, f"The part {where}")
    if not isinstance(part, Mapping):
        raise SkipRecord("malformed_record", f"The part {where} is {kind(part)}, but must be an object or a text.")
    given = {key: value for key, value in part.items() if value is not None}
    sort = given.get("type", "text" if "text" in given else None)
    if sort in _TEXT_TYPES:
        _check_part(given, ("type", "text", *_PART_NOTES), where)
        return check_text(given.get("text"), f"The text of the part {where}")
    if sort not in _IMAGE_TYPES:
        names = ", ".join(map(repr, (*_TEXT_TYPES, *_IMAGE_TYPES)))
        detail = f"The part {where} has the type {shown(sort)}, but it must be one of {names}."
        raise SkipRecord("malformed_record", detail)
    _check_part(given, ("type", "index", "text", *IMAGE_KEYS, *_PART_NOTES), where)
    if given.get("text"):
        raise SkipRecord("malformed_record", f"The part {where} has both an image and a text; make it two parts.")
    index = given.get("index")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise SkipRecord("malformed_record", f"The part {where} has the index {shown(index)}, but it must be a number.")
    own = {key: given[key] for key in IMAGE_KEYS if key in given}
    if sort != "image" and not own:
        raise SkipRecord("malformed_record", f"The part {where} has the type {sort!r}, but no {', '.join(IMAGE_KEYS)}.")
    return _Source(where, own or None, index)


def _check_part(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuses every key of a part that has no meaning: parts are small and written for the program that reads them."""
    for key in given:
        if key not in known:
            detail = f"The part {where} has the key {shown(key)}, but no meaning is known for it; known are "
            raise SkipRecord("malformed_record", detail + f"{', '.join(known)}.")


def _check_order(messages: Sequence[_Message]) -> None:
    """Checks that the system speaks first, and that user and assistant then take turns."""
    for before, one in zip([None, *messages], messages, strict=False):
        if one.role == "system" and before is not None:
            raise SkipRecord("malformed_record", f"The message {one.where} is the system's, which must be the first.")
        if before is not None and one.role == before.role:
            raise SkipRecord(
                "malformed_record",
                f"The messages {before.where} and {one.where} are both the {one.role}'s, but user and assistant must "
                "take turns; join them.",
            )
