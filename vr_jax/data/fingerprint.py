"""Tells whether the files of a data set are still those that a run began with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from vr_jax.storage import Path, file_errors

_LISTED = 200  # files that are listed one by one; of more there is only a digest


def data_files(source: Any) -> list[Path]:
    """Returns the files that hold the records of a source, in its order; images in files of their own do not count.

    Args:
        source: A source, or several in one. A source names its files by an attribute `files`; one that generates its
            records has none.
    """
    return list(_files(source))


def _files(source: Any) -> Iterator[Path]:
    yield from getattr(source, "files", ())
    for part in getattr(source, "sources", ()):
        yield from _files(part)


def fingerprint(source: Any) -> dict[str, Any]:
    """Returns what tells the data of a source apart: its number of records, and names, sizes and times of its files.

    The folders of the files do not matter, so that a data set may move.

    Raises:
        UserError: A file has gone.
    """
    found = []
    for path in data_files(source):
        with file_errors(f"{path} cannot be read"):
            state = path.stat()
        found.append([path.name, state.st_size, state.st_mtime_ns])
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    listed = {"files": found} if len(found) <= _LISTED else {}
    return {"records": len(source), "number": len(found), "sha256": digest, **listed}


def change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says what differs between two fingerprints, or returns None where nothing does.

    Args:
        before: What `fingerprint` returned when the run began.
        now: What it returns now.
    """
    if before["sha256"] == now["sha256"]:
        if before["records"] == now["records"]:
            return None
        return f"there were {before['records']} records, now {now['records']}"
    if before["number"] != now["number"]:
        return f"there were {before['number']} files, now {now['number']}"
    for (name, size, when), (name_now, size_now, when_now) in zip(
        before.get("files", ()), now.get("files", ()), strict=False
    ):
        if name != name_now:
            return f"there was a file {name}, now {name_now}"
        if size != size_now:
            return f"{name} had {size} bytes, now {size_now}"
        if when != when_now:
            return f"{name} was changed at {_time(when_now)}, before at {_time(when)}"
    return f"files among the {now['number']} were changed"


def _time(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(nanoseconds / 1e9))
