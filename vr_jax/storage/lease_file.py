"""The file that holds a lease, which every process changes only if no other process was faster.

Every change of the file is conditional on the version that was read before, as it is with the generations of objects
in a bucket (`vr_jax.storage.bucket_lease`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from vr_jax.storage.files import PathLike


@dataclass(frozen=True)
class Version:
    """A state of a lease file.

    Attributes:
        record: The content, which names the holder.
        refreshed: Time of the last refresh, in nanoseconds since 1970.
    """

    record: bytes
    refreshed: int


class LeaseFile(Protocol):
    """A file that holds a lease. Each change happens only if no other process changed the file before."""

    def create(self, record: bytes, now: float) -> Version | None:
        """Creates the file and returns its state; returns None if the file exists."""

    def read(self) -> Version | None:
        """Returns the present state, or None if there is no file."""

    def refresh(self, version: Version, now: float) -> Version | None:
        """Sets the time of the last refresh if the file is still the holder's; returns None if it is not."""

    def remove(self, version: Version) -> bool:
        """Removes the file if it still is in this state; returns whether it did."""


class DiskLeaseFile:
    """A `LeaseFile` on a disk, which may be shared by several hosts."""

    def __init__(self, path: PathLike):
        """Remembers the path of the file."""
        self._path = os.fspath(path)

    def create(self, record: bytes, now: float) -> Version | None:
        """Creates the file and returns its state; returns None if the file exists."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        try:
            os.write(handle, record)
            return self._stamp(handle, now)
        except BaseException:
            os.unlink(self._path)
            raise
        finally:
            os.close(handle)

    def read(self) -> Version | None:
        """Returns the present state, or None if there is no file."""
        with self._opened() as handle:
            return None if handle is None else self._version(handle)

    def refresh(self, version: Version, now: float) -> Version | None:
        """Sets the time of the last refresh if the file is still the holder's; returns None if it is not."""
        with self._opened() as handle:
            if handle is None or self._version(handle).record != version.record:
                return None
            # The open file is stamped and not the path, so that a file that another process creates now is not touched.
            return self._stamp(handle, now)

    def remove(self, version: Version) -> bool:
        """Removes the file if it still is in this state; returns whether it did."""
        with self._opened() as handle:
            if handle is None:
                return False
            # A process that removes this very file holds its flock. So the file cannot vanish, and another one cannot
            # take its place, between the comparison and the removal. The kernel ends the flock with the process.
            with contextlib.suppress(
                OSError
            ):  # Some network file systems have no flock; a gap of microseconds remains.
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.stat(self._path), os.fstat(handle))
            except FileNotFoundError:
                return False
            if not same or self._version(handle) != version:
                return False
            os.unlink(self._path)
            return True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        try:
            handle = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            yield None
            return
        try:
            yield handle
        finally:
            os.close(handle)

    @staticmethod
    def _version(handle: int) -> Version:
        return Version(os.pread(handle, 1 << 16, 0), os.fstat(handle).st_mtime_ns)

    @classmethod
    def _stamp(cls, handle: int, now: float) -> Version:
        os.utime(handle, ns=(int(now * 1e9),) * 2)
        return cls._version(handle)  # It is read back, since some disks round the time.
