"""Several processes that run one program: how they start, exchange values and agree on errors (a leaf module).

Every function works with one process too, where it costs nothing. All processes call a collective function (`gather`,
`barrier`, `agreement`, `together`, `check_same`) the same number of times and in the same order; otherwise they wait
for each other.

Two mechanisms end a run as a whole when one process fails. Work that needs no other process is done in `together`,
which makes the error of one process that of all. For an error anywhere else `fail` tells the others, and a process that
dies or stands still is missed by them (`vr_jax.processes.liveness`). Then a thread of each process
(`vr_jax.processes.watch`) ends it within seconds, whatever it waits for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from vr_jax.errors import EXIT_FAULT, ProcessLost, UserError, user_error_class
from vr_jax.failures import as_user_error
from vr_jax.processes.liveness import HEARTBEAT_TIMEOUT, START_TIMEOUT, Ending, Liveness
from vr_jax.processes.watch import Watch

# JAX's own service counts a process as lost later than we do, and then aborts the others.
_JAX_TIMEOUT = 100
_JAX_START = 120  # seconds for JAX to connect processes that have all been heard of
_JAX_SHUTDOWN = 45  # seconds that a process which is done waits for the others to be done

logger = logging.getLogger("vr_jax.distributed")
_watch: Watch | None = None


class ProcessFailed(UserError):
    """Another process of the run had an error that was not foreseen."""

    exit_code = EXIT_FAULT


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    automatic: bool = False,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    start_timeout: float = START_TIMEOUT,
) -> None:
    """Connects this process with the others of its run; to be called before anything else uses JAX.

    Without arguments the run has one process, and nothing is done.

    Args:
        coordinator: Address of the first process, "host:port".
        num_processes: Number of processes of the run.
        process_id: Number of this process, from 0.
        automatic: JAX finds what is not given by itself, as it can on TPU pods and under Slurm and Open MPI.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as lost.
        start_timeout: Seconds that the processes wait for each other to start.

    Raises:
        UserError: Only some of the three are given, they contradict each other, or the processes cannot be connected.
        ProcessLost: A process has not started in time.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not automatic:
        if len(missing) == len(given):
            return
        if missing:
            lacking = " and ".join(f"--{name}" for name in missing)
            raise UserError(f"there is no {lacking}: give --coordinator, --num_processes and --process_id together")
    elif missing:
        coordinator, num_processes, process_id = _detect(coordinator, num_processes, process_id)
    if num_processes is None or process_id is None or coordinator is None:
        lacking = ", ".join(name for name, value in given.items() if value is None)
        raise UserError(
            f"JAX does not find the processes of the run by itself ({lacking}); give --coordinator, "
            "--num_processes and --process_id"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(f"process_id = {process_id}: expected 0..{num_processes - 1} for {num_processes} processes")
    _check_address(coordinator)
    global _watch
    if num_processes > 1:
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
        if bind and process_id == 0:
            _check_port(bind, "JAX_COORDINATOR_BIND_ADDRESS")
        liveness = Liveness(coordinator, num_processes, process_id, timeout=heartbeat_timeout, bind=bind)
        liveness.join(start_timeout)
        _watch = Watch(liveness, heartbeat_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=_JAX_START,
            heartbeat_timeout_seconds=_JAX_TIMEOUT,
            shutdown_timeout_seconds=_JAX_SHUTDOWN,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of the run (coordinator {coordinator}) cannot be connected: {reason}"
        ) from error
    versions = {f"the version of {name}": version(name) for name in ("vr-jax", "jax", "jaxlib")}
    check_same({**versions, "the number of devices of the process": jax.local_device_count()})


def _detect(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str | None, int | None, int | None]:
    """What the cluster says of the three that are not given: TPU pods, Slurm, Open MPI, Kubernetes."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, _JAX_START
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise UserError(
            f"JAX does not find the processes of the run by itself ({error}); give --coordinator, --num_processes and "
            "--process_id"
        ) from error
    return found[0], found[1], found[2]


def _check_address(coordinator: str) -> None:
    """Refuses what no other process can have as its address, before this one waits for it."""
    host, port = _check_port(coordinator, "--coordinator")
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise UserError(
            f"--coordinator = {coordinator}: this host does not know the name {host} ({error.strerror}); give the name "
            "or the address of the host of process 0"
        ) from error


def _check_port(address: str, where: str) -> tuple[str, int]:
    """The host and the port of an address."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"{where} = {address}: expected HOST:PORT with a port from 1 to {2**16 - 1}")
    return host, int(port)


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
                raise agreed(
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
            agreed(own)
    for found in filter(None, reports):
        kind_name, message, process = found
        if len(reports) == 1:
            assert own is not None
            if isinstance(own, UserError):
                raise own
            raise UserError(message) from own
        if not kind_name:
            raise agreed(ProcessFailed(f"{process} failed ({message[:200]}); its own log says why")) from own
        raise agreed(user_error_class(kind_name)(f"{process}: {message}")) from own


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


def agreed[Error: BaseException](error: Error) -> Error:
    """Notes that all processes have an error at the same moment, so that nobody has to be told.

    Args:
        error: The error, which is also returned.
    """
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


def fail(error: BaseException) -> Ending:
    """Tells the other processes of a run that this one ends with an error, which ends them too within seconds.

    Nothing is told of an error that all of them have (`agreement`). An error that another process was lost waits until
    it is known which one that was.

    Returns:
        The line and the exit status of this process. Where there are several, the line begins with the process that
        failed first.
    """
    foreseen = as_user_error(error)
    message = str(foreseen) if foreseen else f"{type(error).__name__}: {error}".strip(": ")
    own = Ending(message, foreseen.exit_code if foreseen else EXIT_FAULT)
    if _watch is None or getattr(error, "vr_jax_agreed", False):
        return own
    return _watch.tell(own, lost=isinstance(foreseen, ProcessLost))


def is_watched() -> bool:
    """Returns whether the run has several processes that end together (`initialize`)."""
    return _watch is not None


def check_awake() -> None:
    """Ends this process if it stood still for so long that the others have gone on without it.

    It is called before something is written that a later start of the run may be writing by now.
    """
    if _watch is not None:
        _watch.check_awake()


@contextmanager
def at_end(release: Callable[[], object] | None) -> Iterator[None]:
    """Calls a function too if `leave` ends the process within the block, without unwinding it.

    Args:
        release: Gives back what others would otherwise wait for. It is given two seconds. None is nothing.
    """
    if _watch is None or release is None:
        yield
        return
    _watch.releases.append(release)
    try:
        yield
    finally:
        _watch.releases.remove(release)


def leave(code: int) -> None:
    """Ends this process at once where a run has several and it does not succeed; returns otherwise.

    Python's own end would wait for minutes for processes that have ended already. The others hear of what has happened
    through the first process, so it leaves last.

    Args:
        code: The exit status.
    """
    if _watch is not None and code:
        _watch.leave(code)
