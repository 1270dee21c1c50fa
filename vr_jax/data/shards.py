"""Which files of a folder belong to a split, and whether a numbered set of files is complete.

The Hugging Face hub names files `<split>-00003-of-00010.parquet` or `<split>/0003.parquet`, possibly in one folder for
each configuration of a data set. People also write `chartqa_train.json` or `val.parquet`.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from vr_jax.errors import UserError
from vr_jax.storage import BucketPath, Path

# A word of a file name that is one of these names a split. The words of one line mean the same split.
_SPLITS = (("train", "training"), ("validation", "val", "valid", "dev"), ("test", "testing"))
_MEANING = {word: words[0] for words in _SPLITS for word in words}
_WORDS = re.compile(r"[-_.\s]+")
_NUMBER = re.compile(r"[-_](\d+)-of-(\d+)")
_SHOWN = 10


def files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the files below a folder whose names end with one of the suffixes, in any case of letters, sorted.

    Links to folders are followed, and hidden folders and files are left out.
    """
    found: list[Path] = []
    visited: set[str] = set()
    if isinstance(folder, BucketPath):
        names_below = [name for name in folder.objects() if not any(part.startswith(".") for part in name.split("/"))]
        return sorted(path for path in map(folder.joinpath, names_below) if path.suffix.lower() in suffixes)
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # A link leads back to a folder above it.
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        named = (pathlib.Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in named if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(found)


def split_named_by(path: Path, root: Path) -> str | None:
    """Returns the split that the name of a file, or of a folder between it and `root`, states, or None."""
    words = [word for part in (path.stem, *reversed(path.relative_to(root).parent.parts)) for word in _words(part)]
    return next((_MEANING[word] for word in words if word in _MEANING), None)


def _words(name: str) -> list[str]:
    return [word for word in _WORDS.split(name.lower()) if word]


def of_split(files: Sequence[Path], split: str, root: Path) -> list[Path]:
    """Chooses the files of a split.

    Each folder is looked at by itself (a folder that is named like a split belongs to the one above it). Of its files
    those with the name of the split are taken, or else those that name no split at all.

    Args:
        files: Data files below `root`.
        split: The name of the split. "val", "valid", "dev" and "validation" mean the same.
        root: The folder that the user named.

    Returns:
        The chosen files in their order.

    Raises:
        UserError: All files name other splits.
    """
    wanted = _MEANING.get(split.lower(), split)
    groups: dict[Path, list[Path]] = {}
    for path in files:
        groups.setdefault(_configuration(path, root, split), []).append(path)
    chosen: set[Path] = set()
    for members in groups.values():
        named = {path: split_named_by(path, root) for path in members}
        own = [path for path in members if _is_exactly(path, split, root)]
        own = own or [path for path in members if named[path] == wanted]
        chosen.update(own or [path for path in members if named[path] is None])
    if files and not chosen:
        found = sorted({str(split_named_by(path, root)) for path in files})
        raise UserError(
            f"{root}: no file of the split {split!r}; the names of the {len(files)} files state {', '.join(found)}. "
            "Choose one of these with `split`."
        )
    return [path for path in files if path in chosen]


def _configuration(path: Path, root: Path, split: str) -> Path:
    """Returns the folder of a file without the folders that only name its split."""
    folder = path.parent
    while folder != root and (folder.name == split or set(_words(folder.name)) & set(_MEANING)):
        folder = folder.parent
    return folder


def _is_exactly(path: Path, split: str, root: Path) -> bool:
    return path.stem == split or path.stem.startswith(f"{split}-") or split in path.relative_to(root).parent.parts


def is_numbered(path: Path) -> bool:
    """Returns whether the name of a file is that of one of a numbered set."""
    return _NUMBER.search(path.name) is not None


def missing_numbers(files: Iterable[Path]) -> dict[str, tuple[list[int], int]]:
    """Finds the numbers that are missing in numbered sets of files, such as `train-00000-of-00010.parquet`.

    Args:
        files: The files that are there.

    Returns:
        The missing numbers and how many files the set has, by the folder and the name of the set.
    """
    sets: dict[tuple[str, int], set[int]] = {}
    for path in files:
        if match := _NUMBER.search(path.name):
            name = f"{path.parent}/{path.name[: match.start()]}-*-of-{match[2]}{path.name[match.end() :]}"
            sets.setdefault((name, int(match[2])), set()).add(int(match[1]))
    return {
        name: (missing, count)
        for (name, count), numbers in sets.items()
        if (missing := sorted(set(range(count)) - numbers))
    }


def require_complete(files: Sequence[Path]) -> None:
    """Checks that numbered files are all there, and come from one download.

    Args:
        files: The files of a folder, all of one split.

    Raises:
        UserError: A number is missing, or the same data are there in two divisions.
    """
    for name, (missing, count) in missing_numbers(files).items():
        numbers = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise UserError(
            f"{name}: only {count - len(missing)} of {count} files are there, the numbers {numbers} are missing; "
            "repeat the download, or give the files to be read by a pattern."
        )
    counts: dict[str, set[str]] = {}
    for path in files:
        if match := _NUMBER.search(path.name):
            counts.setdefault(f"{path.parent}/{path.name[: match.start()]}", set()).add(match[2])
    for name, found in counts.items():
        if len(found) > 1:
            raise UserError(
                f"{name}-*: the files come from different downloads ({', '.join(sorted(found))} files each), so that "
                "some records would count twice; keep the files of one download, or give them by a pattern."
            )
