"""A folder that one run at a time writes its results to (a leaf module)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


class OutputError(ValueError):
    """An output folder that cannot be used; one line for the user."""


@contextmanager
def directory_lock(folder: Path, results: str, *, overwrite: bool) -> Iterator[None]:
    """Holds `folder` from before the work to the end of writing, so that neither the work nor another run's results
    are lost. Creates it. results: the name of the file that says there are results.

    Raises OutputError if there are and `overwrite` is not set, if another process holds the folder, or if the path is
    no folder; OSError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{folder} is no folder; choose another --output") from None
    lock = _locked(folder / LOCK)
    try:
        if (folder / results).exists() and not overwrite:
            raise OutputError(f"{folder / results} is there already; choose another --output, or --overwrite it")
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()


def _locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BlockingIOError:
            file.close()
            raise OutputError(f"another run is writing to {path.parent}; choose another --output") from None
        file.close()  # removed by the run that held it, between our two steps
