"""Several processes that run one program: how they start, exchange values and agree on errors (a leaf module).

Every function works with one process too, where it costs nothing. All processes call a collective function (`gather`,
`barrier`, `agreement`, `together`, `check_same`) the same number of times and in the same order; otherwise they wait
for each other.

Two mechanisms end a run as a whole when one process fails. Work that needs no other process is done in `together`,
which makes the error of one process that of all. For an error anywhere else `fail` tells the others by the store of
JAX's coordination service, and a thread of each process (`_Watch`) ends it within seconds, whatever it waits for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from vr_jax.errors import EXIT_FAULT, UserError, user_error_class
from vr_jax.failures import as_user_error

_FAILED, _LEFT = "vr_jax/failed", "vr_jax/left"  # folders of the coordination service's store, an entry per process
_LOOK = 0.5  # seconds between two looks of the watching thread
_GRACE = 2.0  # seconds that a process has to end by itself after another one has failed
_OWN_GRACE = 5.0  # the same after its own failure, which may have to release what it holds
_SAY_WAITING = 30  # seconds between two messages of a process that waits for the others to start
_LAST = 5.0  # seconds that the process with the store waits for the others

logger = logging.getLogger("vr_jax.distributed")
_watch: _Watch | None = None


class ProcessFailed(UserError):
    """Another process of the run had an error that was not foreseen."""

    exit_code = EXIT_FAULT


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    automatic: bool = False,
) -> None:
    """Connects this process with the others of its run; to be called before anything else uses JAX.

    Without arguments the run has one process, and nothing is done.

    Args:
        coordinator: Address of the first process, "host:port".
        num_processes: Number of processes of the run.
        process_id: Number of this process, from 0.
        automatic: JAX finds what is not given by itself, as it can on TPU pods and under Slurm and Open MPI.

    Raises:
        UserError: Only some of the three are given, they contradict each other, or the processes cannot be connected.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not automatic:
        if len(missing) == len(given):
            return
        if missing:
            lacking = " and ".join(f"--{name}" for name in missing)
            raise UserError(f"there is no {lacking}: give --coordinator, --num_processes and --process_id together")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(f"process_id = {process_id}: expected 0..{num_processes - 1} for {num_processes} processes")
    if coordinator is not None:
        _check_address(coordinator)
    global _watch
    try:
        with _waiting(coordinator, process_id):
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        where = coordinator or "found by JAX itself"
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes of the run (coordinator {where}) cannot be connected: {reason}") from error
    if process_count() > 1:
        _watch = _Watch()
    versions = {f"the version of {name}": version(name) for name in ("vr-jax", "jax", "jaxlib")}
    check_same({**versions, "the number of devices of the process": jax.local_device_count()})


def _check_address(coordinator: str) -> None:
    """Refuses what no other process can have as its address, before this one waits for it."""
    host, colon, port = coordinator.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator = {coordinator}: expected HOST:PORT with a port from 1 to {2**16 - 1}")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(
            f"--coordinator = {coordinator}: this host does not know the name {host} ({error.strerror}); give the name "
            "or the address of the host of process 0"
        ) from error


@contextmanager
def _waiting(coordinator: str | None, process_id: int | None) -> Iterator[None]:
    """Says every half minute for whom this process waits, as it would for five minutes with a wrong address."""
    connected = threading.Event()
    if coordinator is None:
        where = "JAX found its address itself"
    else:
        where = f"coordinator {coordinator}: all must be started with this address of process 0"
    for_whom = "the other processes" if process_id == 0 else "process 0"

    def say() -> None:
        seconds = 0
        while not connected.wait(_SAY_WAITING):
            seconds += _SAY_WAITING
            logger.warning("waited %d s for %s of the run (%s)", seconds, for_whom, where)

    threading.Thread(target=say, name="waiting for the other processes", daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def process_index() -> int:
    """Returns the number of this process, from 0."""
    return int(jax.process_index())


def process_count() -> int:
    """Returns the number of processes of the run."""
    return int(jax.process_count())


def is_first() -> bool:
    """Returns whether this is process 0, the one that writes what a run has once."""
    return process_index() == 0


def gather[Value](value: Value) -> list[Value]:
    """Exchanges a value between all processes.

    Args:
        value: Anything that JSON holds. With one process it is returned as it is.

    Returns:
        The value of every process, by process index, on every process.
    """
    if process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int64(len(data)))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - len(data)))
    rows: Any = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def barrier(name: str) -> None:
    """Waits until every process has called it with the same name."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(f"vr_jax {name}")


def this_process() -> str:
    """Returns the words for this process in messages, e.g. "process 1 of 2 on host-b"."""
    return f"process {process_index()} of {process_count()} on {socket.gethostname()}"


def check_same(values: Mapping[str, Any]) -> None:
    """Makes sure that all processes have the same values. All of them call it together.

    Args:
        values: Anything that JSON holds, by the name that messages give it; nested mappings are compared by part.

    Raises:
        UserError: A process has another value than the first one; the message names it and the value.
    """
    mine = _flat(values)
    every: list[dict[str, Any]] = gather({"process": this_process(), "values": mine})
    for other in every[1:]:
        for name in sorted({*every[0]["values"], *other["values"]}):
            first, found = (one["values"].get(name, "nothing") for one in (every[0], other))
            if first != found:
                raise _agreed(
                    UserError(
                        f"{other['process']}: {name} is {found!r} there and {first!r} on process 0; start all "
                        "processes of a run in the same way"
                    )
                )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one by dotted name, with values as JSON leaves them."""
    found: dict[str, Any] = {}
    for name, part in value.items():
        if isinstance(part, Mapping) and part:
            found |= _flat(part, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.loads(json.dumps(part))
    return found


@contextmanager
def agreement() -> Iterator[None]:
    """Makes an error that one process has within the block an error of all processes at the end of the block.

    The block must not call collective functions: a process that fails before such a call would never take part in it.

    Raises:
        UserError: The foreseen error of the first process that had one, or a failure of its disk, memory or libraries
            (`vr_jax.failures`). Its class and exit code are kept, and with several processes the message names the
            process and its host.
        ProcessFailed: Another process failed unforeseen. The failing process raises its own error.
    """
    report: list[str] | None = ["", "interrupted", this_process()]
    own: BaseException | None = None
    try:
        yield
        report = None
    except Exception as error:  # Whatever it is, the others learn of it; a fault of the program is raised again below.
        own = error
        foreseen = as_user_error(error)
        kind = type(foreseen).__qualname__ if foreseen else ""
        report = [kind, str(foreseen) if foreseen else f"{type(error).__name__}: {error}", this_process()]
        if foreseen is None:
            raise
    finally:
        reports = gather(report)
        if own is not None:
            _agreed(own)
    for found in filter(None, reports):
        kind_name, message, process = found
        if len(reports) == 1:
            assert own is not None
            if isinstance(own, UserError):
                raise own
            raise UserError(message) from own
        if not kind_name:
            raise _agreed(ProcessFailed(f"{process} failed ({message[:200]}); its own log says why")) from own
        raise _agreed(user_error_class(kind_name)(f"{process}: {message}")) from own


def together[Value](call: Callable[[], Value]) -> Value:
    """Calls a function on every process and returns only if it succeeded on all of them.

    Args:
        call: The function of this process, which must not call collective functions. It may do something on the first
            process only.

    Returns:
        What the call returned on this process.

    Raises:
        UserError: The call had a foreseen error or a failure on some process; see `agreement`.
        ProcessFailed: The call failed unforeseen on another process.
    """
    with agreement():
        return call()


def _agreed[Error: BaseException](error: Error) -> Error:
    """Notes that all processes know of an error, so that nobody has to be told."""
    error.vr_jax_agreed = True  # type: ignore[attr-defined]
    return error


@contextmanager
def told() -> Iterator[None]:
    """Tells the other processes of an error of the block, before what encloses the block waits for them in its end."""
    try:
        yield
    except BaseException as error:
        fail(error)
        raise


def fail(error: BaseException) -> str:
    """Tells the other processes of a run that this one ends with an error, which ends them too within seconds.

    Nothing is told of an error that all of them have (`agreement`).

    Returns:
        The message of the error. Where there are several processes it begins with the process that failed first.
    """
    foreseen = as_user_error(error)
    message = str(foreseen) if foreseen else f"{type(error).__name__}: {error}".strip(": ")
    if _watch is None or getattr(error, "vr_jax_agreed", False):
        return message
    return _watch.tell(message, foreseen.exit_code if foreseen else EXIT_FAULT)


def is_watched() -> bool:
    """Returns whether the run has several processes that end together (`initialize`)."""
    return _watch is not None


def leave(code: int) -> None:
    """Ends this process at once where a run has several and it does not succeed; returns otherwise.

    Python's own end would wait for minutes for processes that have ended already. The first process holds the store by
    which the others learn what has happened, so it leaves last.

    Args:
        code: The exit status.
    """
    if _watch is not None and code:
        _watch.leave(code)


class _Watch:
    """Watches over the other processes of a run, and ends this one if one of them fails."""

    def __init__(self) -> None:
        """Starts the thread that looks for failures."""
        self._client: Any = jax_distributed.global_state.client
        self._me, self._count, self._name = process_index(), process_count(), this_process()
        self._leaving = threading.Lock()
        self._ending = threading.Event()
        self._own: str | None = None
        threading.Thread(target=self._look, name="failures of other processes", daemon=True).start()

    def tell(self, message: str, code: int) -> str:
        """Stores the failure of this process, unless another one has failed before; returns the first message."""
        if self._own is None:
            found = self._failure()
            if found is None:
                found = {"message": f"{self._name}: {message}", "code": code}
                with suppress(Exception):  # The store may be gone with the process that holds it.
                    self._client.key_value_set(f"{_FAILED}/{self._me}", json.dumps(found))
            self._own = found["message"]
        return self._own

    def leave(self, code: int) -> None:
        """Ends this process."""
        self._ending.set()
        with self._leaving:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            with suppress(Exception):
                self._client.key_value_set(f"{_LEFT}/{self._me}", str(code))
                end = time.monotonic() + _LAST
                while self._me == 0 and time.monotonic() < end and self._entries(_LEFT) < self._count:
                    time.sleep(0.1)
                if self._me == 0:
                    time.sleep(0.2)  # The others have said that they leave, and now they do.
            os._exit(code)

    def _entries(self, folder: str) -> int:
        return len(self._client.key_value_dir_get(folder))

    def _failure(self) -> dict[str, Any] | None:
        """The first failure that any process has stored."""
        try:
            found = self._client.key_value_dir_get(_FAILED)
        except Exception:  # whatever the service says, nothing is known of a failure
            return None
        return json.loads(sorted(found)[0][1]) if found else None

    def _look(self) -> None:
        while not self._ending.wait(_LOOK):
            found = self._failure()
            if found is None:
                continue
            # The main thread may be about to end by itself, with the same message; otherwise it waits for somebody.
            if self._ending.wait(_GRACE if self._own is None else _OWN_GRACE):
                return
            logger.error("%s", found["message"])
            self.leave(int(found["code"]))
