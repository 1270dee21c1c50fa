"""The forms in which a record contains or names an image: bytes, base64, data URIs, structs and file names."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.data.schema import IMAGE_KEYS, check_keys, shown
from vr_jax.data.skips import SkipRecord
from vr_jax.storage import Path

_DATA_URI = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
# How the formats of `vr_jax.data.images` begin. A file name of base64's characters alone is not mistaken for an image.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SHORTEST_BASE64 = 40


def image_of(value: Any, where: str, folder: Callable[[object], Path]) -> Path | bytes:
    """Returns the encoded bytes of an image that a record contains, or the path of the file that it names.

    Args:
        value: The image, as `vr_jax.data.schema.ImageValue` or `ImageContent` describes it.
        where: The field, for messages.
        folder: Turns a file name into a path, as an `ImageFolder` does.

    Raises:
        SkipRecord: The value is no image, or its name cannot be used.
    """
    for _ in range(2):  # A part's `image` may be a struct itself.
        value = _member(value, where) if isinstance(value, Mapping) else value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str) or not value:
        detail = (
            f"The field {where!r} contains {shown(value)}, but must contain a file name, a data URI, base64 or bytes."
        )
        raise SkipRecord("malformed_record", detail)
    data = _embedded(value, where)
    if data is not None:
        return data
    scheme = _SCHEME.match(value)
    if scheme is None:
        return folder(value)
    if scheme[0].lower() == "file://":
        host_and_path = value[len(scheme[0]) :]
        return folder(urllib.parse.unquote(host_and_path[max(0, host_and_path.find("/")) :]))
    raise SkipRecord(
        "malformed_record",
        f"The field {where!r} contains the address {shown(value)}, but nothing is downloaded while records are read, "
        "because a run could then be neither repeated nor bounded in time. Download the image and give its file name.",
    )


def _member(value: Mapping[str, Any], where: str) -> Any:
    """Returns the member of a struct that contains the image. `bytes` are taken before the path that they came from."""
    check_keys(value, (*IMAGE_KEYS, "detail"), f"The field {where!r}")
    given = [key for key in IMAGE_KEYS if value.get(key) is not None]
    if given[:1] == ["bytes"]:
        data = value["bytes"]
        return _decoded(data, where) if isinstance(data, str) else data
    if len(given) != 1:
        found = f"has {', '.join(given)}" if given else f"contains {shown(dict(value))}"
        raise SkipRecord(
            "malformed_record", f"The field {where!r} {found}, but must have one of {', '.join(IMAGE_KEYS)}."
        )
    (key,) = given
    inner = value[key]
    if key == "base64":
        data = _embedded(inner, where) if isinstance(inner, str) else None
        return _decoded(inner, where) if data is None else data
    if key == "image_url" and isinstance(inner, Mapping):
        check_keys(inner, ("url", "detail"), f"The field {where!r}")
        return inner.get("url")
    return None if isinstance(inner, Mapping) and key != "image" else inner


def _embedded(text: str, where: str) -> bytes | None:
    """Returns the image that a data URI or base64 contains, or None if the text is another one."""
    uri = _DATA_URI.match(text)
    if uri is not None:
        kind, options = uri[1].lower(), uri[2].lower()
        if kind and not kind.startswith("image/"):
            detail = f"The field {where!r} is a data URI of the type {shown(kind)}, but must be one of an image."
            raise SkipRecord("malformed_record", detail)
        body = text[uri.end() :]
        if "base64" not in options.split(";"):
            return urllib.parse.unquote_to_bytes(body)
        return _decoded(urllib.parse.unquote(body), where)
    if text[:5].lower() == "data:":
        raise SkipRecord("malformed_record", f"The field {where!r} contains {shown(text)}, which is no valid data URI.")
    if len(text) < _SHORTEST_BASE64:
        return None
    head = "".join(text[:_SHORTEST_BASE64].split())
    head = head[: len(head) // 4 * 4]
    if not _BASE64.fullmatch(head) or not _is_image(base64.b64decode(head)):
        return None
    return _decoded(text, where)


def _decoded(text: Any, where: str) -> bytes:
    """Decodes base64. White space is ignored, and the padding at the end may be absent."""
    if not isinstance(text, str):
        raise SkipRecord("malformed_record", f"The field {where!r} contains {shown(text)}, but must contain base64.")
    compact = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # Characters that are not ASCII are a ValueError.
        detail = f"The field {where!r} contains {shown(text)}, which is not valid base64: {error}."
        raise SkipRecord("malformed_record", detail) from error


def _is_image(head: bytes) -> bool:
    """Returns whether bytes begin as an encoded image does."""
    portable = head[:1] == b"P" and head[1:2] in b"123456fyF7" and head[2:3].isspace()
    return head.startswith(_SIGNATURES) or portable or head[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1")
