"""`BucketPath`: an address in a bucket with the methods of `pathlib.Path`.

It derives from the path class of etils, which Orbax and TensorFlow Datasets take, and does what etils leaves out or
does differently from pathlib: listings are never remembered, an address is never looked up on the disk, sizes have
pathlib's names, and a store that fails raises `StoreError` (`vr_jax.storage.store`).

A bucket has no folders. A folder exists where an object's name begins with its own, so `mkdir` writes nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Self

from etils.epath.gpath import PosixGPath

from vr_jax.storage import store

_READ_AHEAD = 1 << 20  # bytes of a request, where a reader asks for fewer
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class ObjectState:
    """What is known of an object without reading it.

    Attributes:
        st_size: Bytes.
        st_mtime_ns: Time of its last change, in nanoseconds since 1970.
        version: What changes with its content: the store's checksum, or its tag.
    """

    st_size: int
    st_mtime_ns: int
    version: str


class BucketPath(PosixGPath):
    """An address in a bucket (gs://, s3://)."""

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is such an object, or one below this name."""
        del follow_symlinks
        return self._info() is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there are objects below this name."""
        del follow_symlinks
        found = self._info()
        return found is not None and found["type"] == "directory"

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Returns whether there is such an object."""
        del follow_symlinks
        found = self._info()
        return found is not None and found["type"] != "directory"

    def is_symlink(self) -> bool:
        """Returns False: a bucket has no links."""
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Returns size and time of an object.

        Raises:
            FileNotFoundError: There is nothing of this name.
        """
        del follow_symlinks
        found = self._info()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _state(found)

    def iterdir(self) -> Iterator[Self]:
        """Yields what is directly below this name.

        Raises:
            FileNotFoundError: There is nothing.
        """
        with store.store_errors(str(self)):
            found = store.filesystem(str(self)).ls(str(self), detail=True, refresh=True)
        names = [one["name"].rstrip("/").rpartition("/")[2] for one in found if self._is_below(one["name"])]
        if not names and any(one["type"] != "directory" for one in found):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        for name in names:
            yield self / name

    def objects(self) -> dict[str, ObjectState]:
        """Returns all objects below this name at any depth, by their names relative to it, with one listing."""
        with store.store_errors(str(self)):
            found = store.filesystem(str(self)).find(str(self), detail=True)
        prefix = f"{str(self).partition('://')[2]}/"
        return {
            name.removeprefix(prefix): _state(one)
            for name, one in sorted(found.items())
            if name.startswith(prefix) and not name.endswith("/") and one["type"] != "directory"
        }

    def walk(
        self,
        top_down: bool = True,
        on_error: Callable[[OSError], object] | None = None,
        follow_symlinks: bool = False,
    ) -> Iterator[tuple[Self, list[str], list[str]]]:
        """Yields each folder below this name with the names of its folders and files; one listing is made."""
        del on_error, follow_symlinks
        folders: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
        for name in self.objects():
            *above, last = name.split("/")
            for depth, part in enumerate(above):
                folders["/".join(above[:depth])][0].add(part)
                folders.setdefault("/".join(above[: depth + 1]), (set(), []))
            folders["/".join(above)][1].append(last)
        for folder in sorted(folders, reverse=not top_down):
            below, files = folders[folder]
            yield (self / folder if folder else self), sorted(below), files

    def rglob(self, pattern: str, **_: Any) -> Iterator[Self]:
        """Yields the files and folders of any depth whose names match a pattern."""
        return self.glob(f"**/{pattern}")

    def glob(self, pattern: str, **_: Any) -> Iterator[Self]:
        """Yields the files and folders below this name that match a pattern; `**` is any number of folders.

        An upper or lower case letter is another letter, and a name that begins with a dot is matched as any other.
        """
        parts = pattern.split("/")
        fixed = 0
        while fixed < len(parts) - 1 and not _MAGIC.search(parts[fixed]):
            fixed += 1
        start = self.joinpath(*parts[:fixed]) if fixed else self
        rest = parts[fixed:]
        if len(rest) == 1 and rest[0] != "**":
            try:
                below = list(start.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return
            yield from sorted(one for one in below if fnmatch.fnmatchcase(one.name, rest[0]))
            return
        names = list(start.objects())
        folders = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
        for name in sorted({*names, *folders}):
            if _matches(name.split("/"), rest):
                yield start / name

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes sure that no object has the name of a folder; a folder itself is nothing in a bucket.

        Raises:
            FileExistsError: There is such an object, or, unless `exist_ok`, a folder.
        """
        del mode, parents
        found = self._info()
        if found is not None and (found["type"] != "directory" or not exist_ok):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def rmdir(self) -> None:
        """Does nothing for an empty folder.

        Raises:
            OSError: It holds something.
        """
        if self.is_dir():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes all objects below this name.

        Raises:
            FileNotFoundError: There are none.
        """
        names = [f"{self}/{name}" for name in self.objects()]
        if not names and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self._remove(names)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object.

        Raises:
            FileNotFoundError: There is none.
        """
        try:
            with store.store_errors(str(self)):
                store.filesystem(str(self)).rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: Any) -> Self:
        """Copies an object, or a folder with all that it holds, within the store, then removes the first one.

        Raises:
            FileNotFoundError: There is nothing of this name.
        """
        new = type(self)(target)
        below = self.objects()
        if not below and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        pairs = [(f"{self}/{name}", f"{new}/{name}") for name in below] or [(str(self), str(new))]
        with store.store_errors(str(self)):
            for source, copy in pairs:
                store.filesystem(str(self)).cp_file(source, copy)
        self._remove([source for source, _ in pairs])
        return new

    def replace(self, target: Any) -> Self:
        """Does the same as `rename`, which replaces an object of that name."""
        return self.rename(target)

    def read_bytes(self) -> bytes:
        """Returns the content of an object, whole and compared with the store's checksum."""
        return store.read_object(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Returns the content of an object as a text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Writes an object, which is there whole or as it was before."""
        whole = bytes(data)
        store.write_object(str(self), whole)
        return len(whole)

    def upload(self, file: str | os.PathLike[str]) -> None:
        """Writes the content of a file of a disk as an object, in parts where it is large."""
        with store.store_errors(str(self)):
            store.filesystem(str(self)).put_file(os.fspath(file), str(self))

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        """Writes a text as an object."""
        del newline
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def open(  # type: ignore[override]  # etils takes fewer arguments
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Opens an object to read any part of it, or to write it as a whole when it is closed.

        Raises:
            FileNotFoundError: There is no such object.
            ValueError: The mode is none of r, rb, w, wb.
        """
        del buffering
        kind = mode.replace("b", "").replace("t", "")
        if kind not in ("r", "w"):
            raise ValueError(f"mode {mode!r}: an object of a bucket is read or written as a whole")
        binary: Any = io.BufferedReader(_Reader(self), _READ_AHEAD) if kind == "r" else _Writer(self)
        if "b" in mode:
            return binary
        return io.TextIOWrapper(binary, encoding=encoding or "utf-8", errors=errors, newline=newline)

    def absolute(self) -> Self:
        """Returns itself: an address is whole."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Returns the address without `..`."""
        del strict
        parts: list[str] = []
        for part in str(self).partition("://")[2].split("/"):
            if part != "..":
                parts.append(part)
            elif len(parts) > 1:
                parts.pop()
        return type(self)(f"{store.kind_of(str(self))}://{'/'.join(parts)}")

    def expanduser(self) -> Self:
        """Returns itself."""
        return self

    def _info(self) -> dict[str, Any] | None:
        try:
            with store.store_errors(str(self)):
                found: dict[str, Any] = store.filesystem(str(self)).info(str(self))
                return found
        except FileNotFoundError:
            return None

    def _remove(self, names: list[str]) -> None:
        with store.store_errors(str(self)):
            many = [name for name in names if not _MAGIC.search(name)]  # many at once are taken for patterns
            if many:
                store.filesystem(str(self)).rm(many)
            for name in set(names) - set(many):
                store.filesystem(str(self)).rm_file(name)

    def _is_below(self, name: str) -> bool:
        own = str(self).partition("://")[2].rstrip("/")
        return name.rstrip("/") != own


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether the parts of a name match those of a pattern."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[k:], patterns[1:]) for k in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _state(found: dict[str, Any]) -> ObjectState:
    when = found.get("mtime") or found.get("LastModified")
    time_ns = int(when.timestamp() * 1e6) * 1000 if when is not None else 0
    version = found.get("crc32c") or found.get("ETag") or found.get("etag") or ""
    return ObjectState(int(found.get("size") or 0), time_ns, str(version).strip('"'))


class _Reader(io.RawIOBase):
    """Reads parts of an object as they are asked for."""

    def __init__(self, path: BucketPath):
        super().__init__()
        self.name = str(path)
        state = path.stat()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        self._size, self._at = state.st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        data = store.read_range(self.name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Writer(io.BytesIO):
    """Holds what is written, and writes the object when it is closed without an error."""

    def __init__(self, path: BucketPath):
        super().__init__()
        self._path = path

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._path = None  # type: ignore[assignment]  # half an object is never written
        self.close()

    def close(self) -> None:
        if not self.closed and self._path is not None:
            self._path.write_bytes(self.getvalue())
        super().close()
