"""A lease on a folder, so that one run at a time writes to it, on this host or on another one.

The lease is a file that is created exclusively. It names its holder and is kept fresh by a thread of the holder; on a
disk the time of its last refresh is the file's modification time, in a bucket it is written into the object. A lease
that was not refreshed for `STALE_AFTER` seconds, or whose process is gone from this machine, may be removed by anyone
who wants the folder. The clocks of the hosts must agree to within a fraction of that time.

Who finds a folder held is told at once where the holder certainly lives: its process runs on this machine, or the lease
is refreshed while one looks. Only a holder on another host that gives no sign of life is waited for.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from vr_jax import distributed
from vr_jax.errors import UserError
from vr_jax.failures import first_error_kept
from vr_jax.storage.bucket_lease import BucketLeaseFile
from vr_jax.storage.files import PathLike, as_path, file_errors, is_local
from vr_jax.storage.lease_file import DiskLeaseFile, LeaseFile, Version
from vr_jax.storage.store import StoreError

LOCK_FILE = ".lock"
STALE_AFTER = 60.0  # seconds without a refresh after which a holder counts as gone
_REFRESHES = 12  # number of refreshes within that time, so that a holder that lives is known within 5 seconds
_POLL = 1.0  # seconds after which a waiting process looks again

logger = logging.getLogger("vr_jax.storage")


@dataclass(frozen=True)
class Clock:
    """The clock of a lease. Tests replace it by one that needs no waiting.

    Attributes:
        now: Returns the seconds since 1970.
        pause: Waits for a number of seconds.
    """

    now: Callable[[], float] = time.time
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as its file names it.

    Attributes:
        token: A random text that no other lease has.
        host: Name of the host.
        user: Name of the user.
        process: Number of the process.
        since: When the lease was taken, in UTC.
        machine: Identity of the running kernel and of its process numbers; empty where the kernel tells neither.
        started: When the process was started, in ticks of the kernel; it tells two processes of one number apart.
    """

    token: str
    host: str
    user: str
    process: int
    since: str
    machine: str
    started: str

    @classmethod
    def this_process(cls, now: float) -> Holder:
        """Returns this process as a new holder."""
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a container may have no name for the user's number
            user = str(os.getuid())
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
        process = os.getpid()
        token = secrets.token_hex(16)
        return cls(token, socket.gethostname(), user, process, since, _machine(), _started(process) or "")

    @classmethod
    def parse(cls, record: bytes) -> Holder | None:
        """Returns the holder that a lease file names, or None for a file that was cut short or is something else."""
        try:
            return cls(**json.loads(record))
        except (ValueError, TypeError):
            return None

    def record(self) -> bytes:
        """Returns the content of the lease file."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def is_here(self) -> bool:
        """Returns whether the process belongs to this machine, so that it is known whether it runs."""
        return bool(self.machine) and self.machine == _machine()

    def is_gone(self) -> bool:
        """Returns whether the process has certainly ended; False where another machine would have to be asked."""
        return self.is_here() and _started(self.process) != self.started

    def __str__(self) -> str:
        """Returns the holder as messages name it."""
        return f"{self.user}@{self.host}, process {self.process}, since {self.since}"


def _machine() -> str:
    """The identity of the running kernel and of the namespace of its process numbers; a container has its own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """The start time of a process of this machine, or None if it has ended; one that only waits to be reaped has."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may hold spaces
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Lease:
    """A lease that this process holds. `acquire` makes one.

    A thread refreshes the lease until `release`. If the process stands still for so long that another one takes the
    lease over, `check` raises an error afterwards.
    """

    def __init__(self, place: str, file: LeaseFile, version: Version, *, stale_after: float, clock: Clock):
        """Starts to refresh a file that `acquire` created."""
        self._place, self._file, self._clock = place, file, clock
        self._version: Version | None = version
        self._guard = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(
            target=self._keep, args=(stale_after / _REFRESHES,), daemon=True, name=f"lease on {place}"
        )
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        place: str,
        file: LeaseFile,
        *,
        wait: float = 0.0,
        stale_after: float = STALE_AFTER,
        clock: Clock | None = None,
    ) -> Lease:
        """Takes a lease that is free, or that its holder has left behind.

        Args:
            place: The name of the folder in messages.
            file: The lease file.
            wait: Seconds to wait for a holder on another host that gives no sign of life to end or to become stale.
            stale_after: Seconds without a refresh after which a holder counts as gone.
            clock: Time; the default is the real one.

        Raises:
            UserError: Another process holds the lease; the message names it.
        """
        clock = clock or Clock()
        begin, said = clock.now(), False
        first: Version | None = None  # what was found when the waiting began
        since = begin  # when it was found
        record = Holder.this_process(begin).record()
        while True:
            version = file.create(record, clock.now())
            if version is not None:
                return cls(place, file, version, stale_after=stale_after, clock=clock)
            found = file.read()
            if found is None:
                first = None
                continue  # The holder has released it just now.
            holder = Holder.parse(found.record)
            age = clock.now() - found.refreshed / 1e9
            # Its clock may be ahead of this one, so that its last refresh never looks old.
            silent = found == first and clock.now() - since > stale_after
            if age > stale_after or silent or (holder is not None and holder.is_gone()):
                if file.remove(found):
                    logger.warning(
                        "%s: the run that held it is gone (%s); it is taken over", place, holder or "unknown"
                    )
                first = None
                continue
            if first is None:
                first, since = found, clock.now()
            lives = (holder is not None and holder.is_here()) or found != first
            if lives or clock.now() - begin >= wait:
                raise UserError(
                    f"{place} is in use by another run ({holder or 'unknown'}, last sign of life {max(age, 0):.0f} s "
                    "ago); wait for its end, or choose another folder"
                )
            if not said:
                said = True
                logger.warning(
                    "%s is held by %s, whose last sign of life was %.0f s ago; it is taken over after %.0f s without "
                    "one",
                    place,
                    holder or "an unknown process",
                    max(age, 0),
                    stale_after,
                )
            clock.pause(min(_POLL, stale_after / _REFRESHES))

    def refresh(self) -> None:
        """Tells others that the holder lives; called by the thread."""
        with self._guard:
            if self._version is None:
                return
            try:
                self._version = self._file.refresh(self._version, self._clock.now())
            except (OSError, StoreError) as error:
                logger.warning("the lease on %s cannot be refreshed now: %s", self._place, error)
            else:
                if self._version is None:
                    logger.error("%s", self._lost())

    def check(self) -> None:
        """Makes sure that the lease is still this process's.

        Raises:
            UserError: Another process has taken it over.
        """
        if self._version is None:
            raise UserError(self._lost())

    def release(self) -> None:
        """Gives the lease back; does nothing if another process has taken it over."""
        self._end.set()
        self._thread.join()
        with self._guard:
            if self._version is not None:
                self._file.remove(self._version)

    def _keep(self, interval: float) -> None:
        """Refreshes the lease until `release`."""
        while not self._end.wait(interval):
            self.refresh()

    def _lost(self) -> str:
        """The message that another process has taken the lease over."""
        return f"{self._place}: this run stood still for so long that its lease was given to another run, or removed"


@contextlib.contextmanager
def lease(path: PathLike, *, wait: float = 0.0, place: PathLike | None = None) -> Iterator[Lease]:
    """Holds a lease file for the length of the block; see `directory_lock`.

    Args:
        path: The lease file, in a folder that exists.
        wait: Seconds to wait for another holder.
        place: What messages call the thing that is held; the default is the file's folder.
    """
    file = as_path(path)
    with file_errors(f"{file} cannot be written"):
        kept = DiskLeaseFile(file) if is_local(file) else BucketLeaseFile(str(file))
        held = Lease.acquire(os.fspath(place or file.parent), kept, wait=wait)
    with file_errors(f"{file} cannot be removed"), first_error_kept(held.release):
        yield held
        held.check()


@contextlib.contextmanager
def directory_lock(folder: PathLike, *, wait: float = 0.0) -> Iterator[Lease | None]:
    """Holds a folder for the length of the block, so that no other run writes to it; creates the folder.

    All processes of a run call it together. The first one holds the lease, and keeps it until all have left the block.

    Args:
        folder: The folder; its file `.lock` is the lease.
        wait: Seconds to wait for a run on another host that gives no sign of life. With more than `STALE_AFTER`
            seconds a run that is restarted elsewhere, because its host was lost, takes its folder over.

    Yields:
        The lease on the first process, whose `check` a long run may call; None on the others.

    Raises:
        UserError: Another run holds the folder (the message names it), or the folder cannot be written.
    """
    place = as_path(folder)
    held = contextlib.ExitStack()

    def acquire() -> Lease | None:
        if not distributed.is_first():
            return None
        make_folder(place)
        return held.enter_context(lease(place / LOCK_FILE, wait=wait))

    with held:
        yield distributed.together(acquire)
        distributed.barrier(f"leaving {place}")


def check_unlocked(folder: PathLike) -> None:
    """Makes sure, before long work, that no other run holds a folder now; the folder need not exist.

    Raises:
        UserError: Another run holds the folder.
    """
    with file_errors(f"{folder} cannot be read"):
        held = (as_path(folder) / LOCK_FILE).exists()
    if held:
        with lease(as_path(folder) / LOCK_FILE):
            pass


def make_folder(folder: PathLike) -> None:
    """Creates a folder and those above it, if they are not there.

    Raises:
        UserError: There is a file of that name, or the folder cannot be created.
    """
    path = as_path(folder)
    with file_errors(f"{path} cannot be created"):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path} is not a folder; choose another one") from None
