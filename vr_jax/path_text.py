"""What a text means that names a file or a folder, in flags and configs alike (a leaf module without JAX).

A field that holds such a text is declared as `PathText`, `OptionalPathText`, `PathsText`, `OptionalPathsText` or
`FileVariantText`. `Config` passes its value through `check_path_text` when it is built, so that every command reads a
path in the same way:

* `~` and `~user` at the beginning become the home folder, and `file:///a` becomes `/a`;
* an empty text is an error, except where it is declared to mean "not set";
* gs://BUCKET/NAME and s3://BUCKET/NAME stay as they are; an address of another kind is an error.

The disk is not asked here. `vr_jax.storage` finds what a pattern matches, and opens the files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote, urlsplit

from vr_jax.errors import ConfigError

BUCKETS = ("gs", "s3")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# What is left of gs://BUCKET after something took it for the name of a local folder.
_SPOILED = re.compile(rf"({'|'.join(BUCKETS)}):/?(?!/)", re.IGNORECASE)
NOT_SET = "None"  # the text by which a command line takes the value of an optional path away


@dataclass(frozen=True)
class PathMark:
    """Marks the text of an annotation as the name of a file or a folder.

    Attributes:
        optional: Whether the empty text is allowed; it means that the path is not set.
        several: Whether the text may hold several paths with commas between.
        variant: Whether `:VARIANT` may follow the path.
    """

    optional: bool = False
    several: bool = False
    variant: bool = False

    def __str__(self) -> str:
        """Returns what messages expect in such a place."""
        return "paths with commas between" if self.several else "the path of a file or a folder"


PathText = Annotated[str, PathMark()]
OptionalPathText = Annotated[str, PathMark(optional=True)]
PathsText = Annotated[str, PathMark(several=True)]
OptionalPathsText = Annotated[str, PathMark(optional=True, several=True)]
FileVariantText = Annotated[str, PathMark(variant=True)]


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path lies in a bucket (gs://, s3://)."""
    return os.fspath(path).startswith(tuple(f"{name}://" for name in BUCKETS))


def check_path_text(text: str, where: str, mark: PathMark | None = None) -> str:
    """Returns a path with the home folder in place of `~`; an address of a bucket stays as it is.

    Args:
        text: The path, as a user wrote it.
        where: The flag or the field in messages.
        mark: What the text may hold beside one path.

    Raises:
        ConfigError: The text is empty, names no home folder that is known, or is an address of another kind.
    """
    mark = mark or PathMark()
    if not text.strip():
        if mark.optional and not text:
            return text
        raise ConfigError(f"{where} is empty; give {mark}, or leave it out")
    if "\0" in text:
        raise ConfigError(f"{where} = {text!r}: a path cannot hold the character NUL")
    if mark.several:
        if not text.strip(", "):
            raise ConfigError(f"{where} = {text!r} names nothing; give {mark}")
        # A part that means itself stays as it is, with its spaces, since the whole may be the name of one file.
        parts = [(part, _one(part.strip(), where) if part.strip() else "") for part in text.split(",")]
        return ",".join(part if whole == part.strip() else whole for part, whole in parts)
    return _one(text, where)


def _one(text: str, where: str) -> str:
    stripped = text.strip()
    if address := _ADDRESS.match(stripped):
        kind = address[1].lower()
        if kind == "file":
            parts = urlsplit(stripped)
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise ConfigError(f"{where} = {text}: expected file:///PATH with the whole path")
            return unquote(parts.path)
        if kind not in BUCKETS:
            raise ConfigError(
                f"{where} = {text}: an address of the kind {kind}:// cannot be read; give a path of a disk"
            )
        if not stripped[address.end() :].strip("/"):
            raise ConfigError(f"{where} = {text}: the name of the bucket is missing")
        return kind + stripped[len(kind) :]
    if spoiled := _SPOILED.match(stripped):
        raise ConfigError(f"{where} = {text}: a path of a bucket begins with {spoiled[1].lower()}://")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        name = text.split("/", 1)[0]
        raise ConfigError(f"{where} = {text}: the home folder {name} is not known; write the whole path")
    return expanded
