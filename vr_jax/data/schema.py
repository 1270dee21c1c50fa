"""What a record may contain, as types, and the rule for keys that it may contain beside that.

Every key of a record, of a message and of a content part is one of three: it has a meaning (the types below), it brings
something that would be lost without a word and is refused by name, or it is ignored. `check_keys` decides.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypedDict

from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Speaker

# The encoded file, or its path where `bytes` is null, as the Image feature of Hugging Face datasets is stored. JSON has
# no bytes and contains them as base64.
ImageFile = TypedDict("ImageFile", {"bytes": bytes | str | None, "path": str | None}, total=False)  # noqa: UP013
# A text is a file name relative to the image folder, a data URI, or the base64 of an encoded image.
ImageValue = str | bytes | ImageFile


class TextContent(TypedDict):
    """A text among the parts of a message, as OpenAI and transformers write it."""

    type: Literal["text"]
    text: str


class Url(TypedDict, total=False):
    """The address of an image in OpenAI's format. Only data URIs and file names can be read."""

    url: str
    detail: str


class ImageUrlContent(TypedDict):
    """An image among the parts of a message, as OpenAI writes it."""

    type: Literal["image_url"]
    image_url: Url | str


class ImageContent(TypedDict, total=False):
    """An image among the parts of a message, as transformers writes it.

    One of `image`, `url`, `path` and `base64` is the image. Where none of them is given, it is image `index` of the
    record's `images`, or without `index` the next one that no other part has.
    """

    type: Literal["image"]
    image: ImageValue | None
    url: str | None
    path: str | None
    base64: str | None
    index: int | None


Content = str | list[str | TextContent | ImageUrlContent | ImageContent]
LlavaMessage = TypedDict("LlavaMessage", {"from": str, "value": str})


class Message(TypedDict):
    """A message as OpenAI and transformers write it."""

    role: str
    content: Content


class Record(TypedDict, total=False):
    """One record. A null means the same as an absent key.

    Attributes:
        id: The name of the sample in messages; by default the name of the file and the number of the record.
        image: The image, or the images in order.
        images: The same under another name. Both keys may be there if they are equal.
        conversations: The messages in LLaVA's format.
        messages: The messages in the format of OpenAI and transformers. One of the two keys has to be there.
        system: The text that replaces the default system message. A first message of the system does the same.
    """

    id: str | int | None
    image: ImageValue | list[ImageValue] | None
    images: ImageValue | list[ImageValue] | None
    conversations: list[LlavaMessage | Message] | None
    messages: list[LlavaMessage | Message] | None
    system: str | None


RECORD_KEYS = frozenset(Record.__annotations__)
MESSAGE_KEYS = frozenset({"from", "role", "value", "content"})
IMAGE_KEYS = ("bytes", "path", "image", "url", "base64", "image_url")

SPEAKERS: Mapping[str, Speaker] = {
    **{"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"},
    **dict.fromkeys(("chatgpt", "bot", "model", "ai"), "assistant"),
    "developer": "system",
}


def _vocabulary(words: str) -> frozenset[str]:
    return frozenset(words.split())


# A key with one of these words brings an image, a video or a sound.
_MEDIA = _vocabulary(
    "image img pic photo pixel visual video clip frame audio sound speech voice media attachment jpg jpeg png "
    "webp gif tiff bmp mp4 webm wav mp3 flac screenshot scan photograph"
) | {"pic" + "ture"}  # The word is not one of this project's own (docs/design/glossary.md), but records have it.
# A key with one of these words brings a text that speaks before the user.
_SYSTEM = _vocabulary("system sys developer persona preamble instruction")
# A key with one of these words changes what a chat template writes, or which tokens are learned.
_EFFECT = _vocabulary("tool function thinking reasoning weight loss trainable history")
_WEIGHT = _vocabulary("weight train trainable")
# A key with one of these words, if it is false, takes tokens out of the loss; a number describes the training.
_LEARNED = _vocabulary("loss training")
# A key with one of these words, if it is true, takes tokens out of the loss.
_UNLEARNED = _vocabulary("mask masked ignore ignored prefix")
# A key that also has one of these words describes something instead of bringing it (`image_id`, `video_source`).
_DESCRIPTION = _vocabulary(
    "id width height size shape resolution ratio count num number n index idx hash md5 sha phash license source origin "
    "dataset format mode type score quality caption description category class label tag has is name"
)
_MEDIA_FILE = re.compile(
    r"[^\n]{1,1000}\.(jpe?g|jfif|jp2|png|webp|gif|bmp|tiff?|avif|hei[cf]|svg|pdf|p[bgp]m|mp4|webm|mkv|avi|mov|m4[av]|ogg|"
    r"wav|mp3|flac)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlist=4, maxdict=4, maxlevel=2)
# The nesting of a value that is looked through for encoded files.
_DEPTH = 4


def shown(value: object) -> str:
    """Returns a value as it stands in a message: what is long is cut in the middle."""
    return _SHORT.repr(value)


def kind(value: object) -> str:
    """Describes the type of a value in a message."""
    return "absent" if value is None else f"a value of type {type(value).__name__}"


def describes_content(key: str) -> bool:
    """Returns whether a key that is not part of the schema sounds as if it brought something that must not be lost."""
    words = _words(key)
    return bool(words & (_MEDIA | _SYSTEM | _EFFECT)) and not words & _DESCRIPTION


def check_keys(found: Mapping[Any, Any], known: Collection[str], where: str, *, names_files: bool = False) -> None:
    """Refuses keys that bring something which would be lost. Others that are not known are ignored.

    A key that is not known is refused if its value is neither empty nor a number, and

    * one of its words names images, videos or sounds (`video`, `img`, `image_2`, `imagePath`), a system text
      (`system_prompt`), or something that changes the prompt or the loss (`tools`, `weight`), and no other word says
      that it is a description (`image_id`, `video_source`);
    * or its value contains encoded files, that is bytes or a data URI;
    * or `names_files` is given and its value is the name of an image, a video or a sound.

    Of numbers, only a weight other than 1 is refused, and `loss` if it is false.

    Args:
        found: The record, message or part.
        known: The keys that have a meaning.
        where: What `found` is, as the beginning of a sentence.
        names_files: Whether file names are refused, which is so in a record without images.

    Raises:
        SkipRecord: "malformed_record" with the name of the key.
    """
    for key, value in found.items():
        if key in known or _is_empty(value):
            continue
        if not isinstance(key, str):
            raise SkipRecord("malformed_record", f"{where} has the key {shown(key)}, which is not a text.")
        problem = _problem(key, value, names_files)
        if problem is not None:
            raise SkipRecord(
                "malformed_record",
                f"{where} has the key {shown(key)}, which {problem}, but no meaning is known for it; known are "
                f"{', '.join(sorted(known))}. Rename or remove it.",
            )


def _problem(key: str, value: Any, names_files: bool) -> str | None:
    """Says what a key brings, or returns None if it may be ignored."""
    words = _words(key)
    described = bool(words & _DESCRIPTION)
    if isinstance(value, int | float):
        weighs = bool(words & _WEIGHT) and value != 1
        weighs |= bool(words & _LEARNED) and value is False
        weighs |= bool(words & _UNLEARNED) and value is True
        return "changes the loss" if weighs and not described else None
    if _contains_file(value, _DEPTH):
        return "contains an encoded file"
    if names_files and _names_file(value, _DEPTH):
        return "names a file of an image, a video or a sound"
    if described:
        return None
    if words & _EFFECT:
        return "changes the prompt or the loss"
    if words & _SYSTEM:
        return "brings a system text"
    return "brings an image, a video or a sound" if words & _MEDIA and not _only_numbers(value, _DEPTH) else None


def _words(key: str) -> set[str]:
    """Returns the words of a key in lower case, those in the plural also in the singular."""
    words = {word.lower() for word in _WORD.findall(key)} | set(re.findall(r"[a-z]+\d+", key.lower()))
    return words | {word[:-1] for word in words if word.endswith("s")}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not value)


def _only_numbers(value: Any, depth: int) -> bool:
    """Returns whether a value is a list of numbers, nested or not, such as sizes or boxes."""
    if not isinstance(value, list):
        return isinstance(value, int | float)
    return depth > 0 and all(_only_numbers(one, depth - 1) for one in value)


def _names_file(value: Any, depth: int) -> bool:
    """Returns whether a value is the name of an image, a video or a sound, or holds one."""
    if isinstance(value, str):
        return _MEDIA_FILE.fullmatch(value.strip()) is not None
    if depth and isinstance(value, Mapping):
        return any(_names_file(one, depth - 1) for one in value.values())
    return bool(depth) and isinstance(value, list) and any(_names_file(one, depth - 1) for one in value)


def _contains_file(value: Any, depth: int) -> bool:
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value) > 0
    if isinstance(value, str):
        return value[:11].lower().startswith(("data:image/", "data:video/", "data:audio/"))
    if depth and isinstance(value, Mapping):
        return any(_contains_file(one, depth - 1) for one in value.values())
    return bool(depth) and isinstance(value, list) and any(_contains_file(one, depth - 1) for one in value)
