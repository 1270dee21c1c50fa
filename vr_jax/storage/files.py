"""Paths, and files that are either whole or absent."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from vr_jax.errors import UserError

type PathLike = str | os.PathLike[str]


def as_path(path: PathLike) -> epath.Path:
    """Returns a path of a disk or a bucket (gs://, s3://); `~` becomes the home folder."""
    return epath.Path(path).expanduser()


def is_local(path: PathLike) -> bool:
    """Returns whether a path lies on a disk, so that files can be renamed and created exclusively."""
    return "://" not in os.fspath(path)


@contextmanager
def file_errors(doing: str) -> Iterator[None]:
    """Turns an `OSError` of the block into a `UserError`.

    Args:
        doing: What the message begins with, e.g. "results.json cannot be written".

    Raises:
        UserError: The block raised an `OSError`; the message ends with its reason and the file at fault.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{doing}: {error}") from error


@contextmanager
def atomic_write(path: PathLike) -> Iterator[epath.Path]:
    """Gives the block a temporary name to write a file under, and makes that file `path` when the block succeeds.

    The temporary name lies beside `path` and ends with its suffix; the folder is created. After an error in the block
    nothing new is left, and an old file of that name stays. Of two writers the last one to finish wins.

    Args:
        path: The file to write.

    Yields:
        The temporary name, of a file that does not exist yet.

    Raises:
        UserError: The file cannot be written.
    """
    target = as_path(path)
    with file_errors(f"{target} cannot be written"):
        if is_local(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
            try:
                yield temporary
                _flush(temporary)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        else:  # A bucket shows an object only when all of it has arrived.
            with tempfile.TemporaryDirectory() as folder:
                temporary = epath.Path(folder) / target.name
                yield temporary
                target.write_bytes(temporary.read_bytes())


def _flush(path: epath.Path) -> None:
    """Waits until the disk holds a file, which must precede the rename: otherwise a power cut may leave it empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file that is either whole or absent.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Writes a UTF-8 file that is either whole or absent.

    Raises:
        UserError: The file cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON-safe value, indented, to a file that is either whole or absent.

    Raises:
        UserError: The file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")
