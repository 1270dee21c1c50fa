"""Which files a path means: names that exist before patterns, lists of several, and what may not be replaced."""

from __future__ import annotations

import glob
import os
import pathlib
from collections.abc import Iterable

from vr_jax.errors import UserError
from vr_jax.path_text import is_bucket
from vr_jax.storage.bucket_path import BucketPath
from vr_jax.storage.files import Path, PathLike, as_path


def refuse_s3(path: PathLike, where: str) -> None:
    """Refuses an address of S3 for what holds checkpoints or weights.

    Raises:
        UserError: The path lies there.
    """
    if os.fspath(path).startswith("s3://"):
        raise UserError(
            f"{where} = {path}: Orbax, which writes checkpoints and weights, takes no s3:// yet; give a folder of a "
            "disk or gs://"
        )


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Returns paths sorted by their names, folder by folder."""
    return sorted(paths, key=lambda path: path.parts)


def split_paths(text: str) -> list[str]:
    """Returns the paths of a text that may hold several with commas between; a name that exists is never split."""
    if not text.strip():
        return []
    if not is_bucket(text) and os.path.lexists(text):
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
        UserError: Nothing matches the pattern, or the path is empty.
    """
    found = as_path(path, where)
    text = os.fspath(found)
    if not glob.has_magic(text) or (found.exists() if isinstance(found, BucketPath) else os.path.lexists(text)):
        return [found]
    matches: list[Path]
    if isinstance(found, BucketPath):
        bucket = BucketPath(*found.parts[:3])
        matches = list(bucket.glob("/".join(found.parts[3:])))
    else:
        matches = [pathlib.Path(name) for name in sorted(set(glob.glob(text, recursive=True)))]
    if not matches:
        raise UserError(f"{where} = {text}: no file matches this pattern, and none has this name")
    return matches


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
    written = _whole(target)
    for one in sources:
        read = _whole(one)
        if written == read or read.is_relative_to(written) or (written.is_relative_to(read) and read.is_file()):
            raise UserError(f"{where} = {target} would replace what {source} = {one} reads; choose another place")


def _whole(path: PathLike) -> Path:
    """The absolute path, without links and `..`."""
    found = as_path(path)
    return found.resolve() if isinstance(found, BucketPath) else pathlib.Path(os.path.realpath(found))
