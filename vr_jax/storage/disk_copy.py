"""Copies on the disk of what lies in a bucket, for libraries that read files of disks only.

The copies are made once in a process. They lie in a temporary folder, which is removed when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Sequence

from vr_jax.errors import UserError
from vr_jax.storage import store
from vr_jax.storage.bucket_path import BucketPath, ObjectState
from vr_jax.storage.files import PathLike, as_path, file_errors

_BLOCK_BYTES = 64 << 20
_guard = threading.Lock()
_copies: dict[tuple[str, tuple[str, ...]], tuple[dict[str, ObjectState], pathlib.Path]] = {}


def on_disk(path: PathLike, names: Sequence[str] = ()) -> pathlib.Path:
    """Returns a file or a folder of a disk with the content of a path.

    Args:
        path: A path of a disk, which is returned as it is, or one of a bucket, which is copied; one that is not there
            is returned as a path that is not there.
        names: Of a folder of a bucket, the names of the files to copy, which lie directly in it; by default all.

    Raises:
        UserError: The bucket cannot be read, an object's name leads out of the folder, or the disk is full.
    """
    found = as_path(path)
    if isinstance(found, pathlib.Path):
        return found
    with _guard, file_errors(f"{found} cannot be copied to a temporary folder"):
        state = _state(found, names)
        key = (str(found), tuple(names))
        if key in _copies and _copies[key][0] == state:
            return _copies[key][1]
        target = pathlib.Path(tempfile.mkdtemp(dir=_folder(os.getpid()))) / (found.name or "bucket")
        for name in state:
            _check_name(found, name)
        for name, one in state.items():
            _copy(found / name if name else found, one.st_size, target / name if name else target)
        _copies[key] = (state, target)
        return target


def _state(path: BucketPath, names: Sequence[str]) -> dict[str, ObjectState]:
    """What has to be copied, by name below the path; the name of a single object is empty."""
    below = path.objects()
    if below:
        return {name: one for name, one in below.items() if not names or name in names}
    return {"": path.stat()} if path.is_file() else {}


def _check_name(path: BucketPath, name: str) -> None:
    """Refuses the name of an object that would be written outside the copy: a bucket may have any."""
    if name and not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UserError(f"{path} holds an object with the name {name!r} below it, which no file can have; remove it")


def _copy(source: BucketPath, size: int, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if size <= _BLOCK_BYTES:
        target.write_bytes(source.read_bytes())
        return
    with target.open("wb") as file:
        for begin in range(0, size, _BLOCK_BYTES):
            file.write(store.read_range(str(source), begin, min(size, begin + _BLOCK_BYTES)))


@functools.lru_cache(maxsize=1)
def _folder(process: int) -> str:
    """The temporary folder of this process; one that was forked has its own."""
    folder = tempfile.mkdtemp(prefix="vr_jax_")

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
