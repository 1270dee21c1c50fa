"""Paths, and files that are either whole or absent."""

from __future__ import annotations

import errno
import functools
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from vr_jax.errors import UserError
from vr_jax.failures import close_after, error_number, explain, store_failure
from vr_jax.path_text import check_path_text, is_bucket
from vr_jax.storage.bucket_path import BucketPath

type PathLike = str | os.PathLike[str]
Path = pathlib.Path | BucketPath  # what the whole package means by a path; `as_path` makes one


def as_path(path: PathLike, where: str = "path") -> Path:
    """Returns a path of a disk or a bucket (gs://, s3://); `~` becomes the home folder.

    Args:
        path: The path, as a user wrote it.
        where: The flag or the field in messages.

    Raises:
        ConfigError: The path is empty, or an address of another kind.
    """
    text = check_path_text(os.fspath(path), where)
    return BucketPath(text) if is_bucket(text) else pathlib.Path(text)


def for_library(path: Path) -> pathlib.Path | IO[bytes]:
    """Returns what a library takes that reads paths of a disk or open files: the path, or an object that is opened."""
    return path if isinstance(path, pathlib.Path) else path.open("rb")


def is_local(path: PathLike) -> bool:
    """Returns whether a path lies on a disk, so that files can be renamed and created exclusively."""
    return not is_bucket(path)


@contextmanager
def file_errors(doing: str, *, needed: int = 0) -> Iterator[None]:
    """Turns what the operating system refuses in the block into a `UserError`.

    Args:
        doing: What the message begins with, e.g. "results.json cannot be written".
        needed: Bytes that the block writes, if they are known; a message about a full disk tells them.

    Raises:
        UserError: The block raised an `OSError`, or an error of a library that quotes one (`vr_jax.failures`). The
            message ends with the reason, the file at fault and what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TensorStore and the tokenizers library have classes of their own for such errors.
        if error_number(error) is None:
            failed = store_failure(error)
            if failed is None:
                raise
            raise UserError(failed) from error
        raise UserError(f"{doing}: {explain(error, needed=needed, known=doing)}") from error


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
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
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
        if is_local(target) and (os.path.isfile(target) or not os.path.lexists(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
            try:
                yield temporary
                _flush(temporary)
                os.replace(temporary, target)
            except BaseException as error:
                close_after(error, functools.partial(temporary.unlink, missing_ok=True))
                raise
        else:  # A bucket shows an object only when all of it has arrived; a device or a pipe is not replaced.
            with tempfile.TemporaryDirectory() as folder:
                temporary = pathlib.Path(folder) / target.name
                yield temporary
                if isinstance(target, BucketPath):
                    target.upload(temporary)
                else:
                    with target.open("wb") as file:
                        file.write(temporary.read_bytes())


def _flush(path: Path) -> None:
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
    with file_errors(f"{as_path(path)} cannot be written", needed=len(data)), atomic_write(path) as temporary:
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


def remove_folder(folder: PathLike) -> None:
    """Removes a folder with all that it holds; does nothing if it is absent. The caller knows whose folder it is.

    Raises:
        UserError: It cannot be removed.
    """
    path = as_path(folder)
    with file_errors(f"{path} cannot be removed"), suppress(FileNotFoundError):
        shutil.rmtree(path) if isinstance(path, pathlib.Path) else path.rmtree()


def remove_empty_folders(folder: PathLike) -> None:
    """Removes a folder and those in it as far as they hold no files, after something failed to fill them.

    A bucket has no empty folders.
    """
    if not is_local(folder):
        return
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # It holds something.
            os.rmdir(path)


def move_folder(folder: PathLike, target: PathLike) -> None:
    """Gives a folder another name; a folder that had that name is removed. In a bucket its objects are copied.

    Raises:
        UserError: It cannot be moved.
    """
    with file_errors(f"{folder} cannot be moved to {target}"):
        remove_folder(target)
        as_path(target).parent.mkdir(parents=True, exist_ok=True)
        as_path(folder).rename(target)
