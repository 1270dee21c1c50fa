"""What grows while a process runs: files that pieces are added to, and folders that a library fills.

On a disk both are what they seem to be. In a bucket they are filled in a temporary folder of this machine, and the
objects are written as a whole now and then.
"""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
import time
from contextlib import AbstractContextManager
from typing import Any, Self

from vr_jax.failures import close_after
from vr_jax.storage.files import PathLike, as_path, file_errors

_UPLOAD_SECONDS = 10.0  # a growing object is written no more often than this,
_UPLOAD_RATE = 1e6  # and so rarely that no more bytes than these go out in a second


class UploadedFolder:
    """A folder for libraries that write to disks only; a context manager.

    Attributes:
        local: The folder of a disk that a library may write to: the folder itself, or a temporary one.
        is_temporary: Whether it is a temporary one, whose files `upload` writes to the bucket.
    """

    def __init__(self, folder: PathLike):
        """Creates the folder, or a temporary one for that of a bucket.

        Raises:
            UserError: It cannot be created.
        """
        self._target: Any = as_path(folder)
        self._sent: dict[str, tuple[int, int]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        with file_errors(f"{self._target} cannot be written"):
            if isinstance(self._target, pathlib.Path):
                self._target.mkdir(parents=True, exist_ok=True)
                self.local = self._target
            else:
                self._temporary = tempfile.TemporaryDirectory(prefix="vr_jax_")
                self.local = pathlib.Path(self._temporary.name)
        self.is_temporary = self._temporary is not None

    def upload(self, last: str = "") -> None:
        """Writes the files that are new or changed to the bucket; does nothing on a disk.

        Args:
            last: The name of the files that are written after the others, since they make a folder count as whole.

        Raises:
            UserError: They cannot be written.
        """
        if not self.is_temporary:
            return
        with file_errors(f"{self._target} cannot be written"):
            files = sorted(path for path in self.local.rglob("*") if path.is_file())
            for file in sorted(files, key=lambda path: path.name == last):
                name, state = file.relative_to(self.local).as_posix(), file.stat()
                if self._sent.get(name) != (state.st_size, state.st_mtime_ns):
                    self._target.joinpath(name).upload(file)
                    self._sent[name] = (state.st_size, state.st_mtime_ns)

    def discard(self) -> None:
        """Removes the temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Removes the temporary folder. The block itself calls `upload` where its end is no reason to."""
        self.discard()


class AppendedFile:
    """A file that grows by whole pieces while it is open; a context manager.

    A piece that cannot be written is taken away again, so that the file never ends in half of one after an error.

    An object of a bucket cannot grow. Its pieces gather in a temporary file, which begins as a copy of the object; the
    object is written anew by `flush`, by `close`, and, while pieces come, every ten seconds or more rarely the larger
    it is. A process that is killed loses the pieces since then.
    """

    def __init__(self, path: PathLike):
        """Opens a file, and creates it and its folder if they are absent.

        Raises:
            UserError: The file cannot be opened.
        """
        self.path = as_path(path)
        self._folder = UploadedFolder(self.path.parent)
        self._changed, self._written = False, time.monotonic()
        with self._errors():
            name = self._folder.local / self.path.name
            if self._folder.is_temporary and self.path.exists():
                name.write_bytes(self.path.read_bytes())
            self._file = open(name, "a+b", buffering=0)  # noqa: SIM115  # it is closed by `close`

    def append(self, data: bytes, *, sync: bool = False) -> None:
        """Adds a piece at the end.

        Args:
            data: The piece.
            sync: Whether the call waits until the disk holds it; a bucket gets it later.

        Raises:
            UserError: It cannot be written; the file is as before.
        """
        with self._errors(len(data)):
            before = self._file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                if sync:
                    os.fsync(self._file.fileno())
            except BaseException as error:
                close_after(error, functools.partial(self._file.truncate, before))
                raise
            self._changed = True
            if time.monotonic() - self._written > max(_UPLOAD_SECONDS, before / _UPLOAD_RATE):
                self.flush()

    def flush(self) -> None:
        """Writes the object of a bucket anew; a file of a disk is always up to date.

        Raises:
            UserError: It cannot be written.
        """
        if self._folder.is_temporary and self._changed:
            with self._errors():
                self.path.write_bytes((self._folder.local / self.path.name).read_bytes())
            self._changed = False
        self._written = time.monotonic()

    def read(self) -> bytes:
        """Returns the content."""
        with self._errors():
            self._file.seek(0)
            return self._file.read()

    def truncate(self, size: int) -> None:
        """Cuts the file."""
        with self._errors():
            self._file.truncate(size)
        self._changed = True

    def close(self) -> None:
        """Closes the file, and writes the object of a bucket.

        Raises:
            UserError: It cannot be written.
        """
        with self._errors(), self._folder:
            self._file.close()
            self.flush()

    def _errors(self, needed: int = 0) -> AbstractContextManager[None]:
        return file_errors(f"{self.path} cannot be written", needed=needed)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it."""
        close_after(error, self.close)
