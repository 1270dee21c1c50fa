"""Several processes that run one program: how they start, exchange values and agree on errors (a leaf module).

Every function works with one process too, where it costs nothing. All processes call a collective function (`gather`,
`barrier`, `agreement`, `together`) the same number of times and in the same order; otherwise they wait for each other
forever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vr_jax.errors import UserError, user_error_class

_UNFORESEEN = "unforeseen error"


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
            lacking = " and ".join(missing)
            raise UserError(f"{lacking} is missing: give coordinator, num_processes and process_id together")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(f"process_id = {process_id}: expected 0..{num_processes - 1} for {num_processes} processes")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        where = coordinator or "found by JAX itself"
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes of the run (coordinator {where}) cannot be connected: {reason}") from error


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


@contextmanager
def agreement() -> Iterator[None]:
    """Makes an error that one process has within the block an error of all processes at the end of the block.

    The block must not call collective functions: a process that fails before such a call would never take part in it.

    Raises:
        UserError: The foreseen error of the first process that had one, or an `OSError` of it. Its class and exit code
            are kept, and with several processes the message names the process.
        RuntimeError: Another process failed unforeseen. The failing process raises its own error.
    """
    foreseen: UserError | OSError | None = None
    report: list[str] | None = [_UNFORESEEN, ""]
    try:
        yield
        report = None
    except (UserError, OSError) as error:
        foreseen = error
        kind = type(error) if isinstance(error, UserError) else UserError
        report = [kind.__qualname__, str(error) or type(error).__name__]
    finally:
        reports = gather(report)
    for process, found in enumerate(reports):
        if found is None:
            continue
        kind_name, message = found
        if kind_name == _UNFORESEEN:
            raise RuntimeError(f"process {process} failed; its own log says why") from foreseen
        if len(reports) > 1:
            message = f"process {process} of {len(reports)}: {message}"
        elif isinstance(foreseen, UserError):
            raise foreseen
        raise user_error_class(kind_name)(message) from foreseen


def together[Value](call: Callable[[], Value]) -> Value:
    """Calls a function on every process and returns only if it succeeded on all of them.

    Args:
        call: The function of this process, which must not call collective functions. It may do something on the first
            process only.

    Returns:
        What the call returned on this process.

    Raises:
        UserError: The call raised a `UserError` or an `OSError` on some process; see `agreement`.
        RuntimeError: The call failed unforeseen on another process.
    """
    with agreement():
        return call()
