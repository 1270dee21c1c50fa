"""Which files a path means: names of a disk before patterns, lists, and places where a bucket cannot be used."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from vr_jax.errors import UserError
from vr_jax.fields import Config, path_values
from vr_jax.path_text import bucket_refused, check_path_text, is_bucket
from vr_jax.storage.files import PathLike


def local_path(path: PathLike, where: str = "path") -> Path:
    """Returns a path of a disk.

    Args:
        path: The path, where `~` stands for the home folder.
        where: The flag or the field in messages.

    Raises:
        UserError: The path is empty, or lies in a bucket.
    """
    text = check_path_text(os.fspath(path), where)
    if is_bucket(text):
        raise UserError(bucket_refused(where, text))
    return Path(text)


def refuse_buckets(config: Config, where: str = "config", *, unless: Iterable[str] = ()) -> None:
    """Makes sure, before anything is opened or written, that no path of a config lies in a bucket.

    Args:
        config: The settings.
        where: The name of the config in messages.
        unless: Beginnings of the names of fields that are not looked at, since they are not used now.

    Raises:
        UserError: A field names a bucket.
    """
    for name, path in path_values(config, where):
        if is_bucket(path) and not name.startswith(tuple(unless)):
            raise UserError(bucket_refused(name, path))


def split_paths(text: str) -> list[str]:
    """Returns the paths of a text that may hold several with commas between; a name that exists is never split."""
    if not text.strip():
        return []
    if os.path.lexists(text):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def matching_paths(path: PathLike, where: str = "path") -> list[Path]:
    """Returns what a path or a pattern means.

    A name that exists is never a pattern, whatever characters it has. In a pattern `*`, `?` and `[...]` stand for
    characters of one name, and `**` for folders of any depth.

    Args:
        path: A file, a folder or a pattern.
        where: The flag or the field in messages.

    Returns:
        The matches of a pattern in order; otherwise the path itself, which need not exist.

    Raises:
        UserError: Nothing matches the pattern, or the path is empty or lies in a bucket.
    """
    found = local_path(path, where)
    text = os.fspath(found)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [found]
    names = sorted(set(glob.glob(text, recursive=True)))
    if not names:
        raise UserError(f"{where} = {text}: no file matches this pattern, and none has this name")
    return [Path(name) for name in names]


def check_apart(target: PathLike, sources: Iterable[PathLike], *, where: str, source: str) -> None:
    """Makes sure that what is written replaces nothing that is read.

    Args:
        target: The file or folder to write.
        sources: Files and folders to read.
        where: The flag of the target in messages.
        source: The flag of the sources in messages.

    Raises:
        UserError: The target is one of the sources, lies in one, or holds one.
    """
    written = Path(os.path.realpath(os.path.expanduser(os.fspath(target))))
    for one in sources:
        read = Path(os.path.realpath(os.path.expanduser(os.fspath(one))))
        if written == read or read.is_relative_to(written) or (written.is_relative_to(read) and read.is_file()):
            raise UserError(f"{where} = {target} would replace what {source} = {one} reads; choose another place")
