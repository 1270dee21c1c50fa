"""Ends a run before its last step: on a signal that asks for it, or where another run has taken its folder over."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from vr_jax import distributed
from vr_jax.errors import EXIT_AGAIN, UserError
from vr_jax.storage import Lease

_NOTICE = b"asked to stop: the run saves its state at the end of the step that it computes or compiles now\n"


class Preempted(UserError):
    """The run was asked to stop and has saved its state; the same command continues it."""

    exit_code = EXIT_AGAIN
    saved = True  # Nothing that was computed is lost.


def check_still_ours(lease: Lease | None) -> None:
    """Makes sure, before a run writes to its folder, that it did not stand still while another one took it over.

    Args:
        lease: The lease on the folder, on the process that holds it.

    Raises:
        UserError: Another run has the lease.
    """
    distributed.check_awake()
    if lease is not None:
        lease.refresh()
        lease.check()


class Preemption:
    """Notices that the run is asked to stop, with the same answer on every process at the same step.

    With one process, SIGTERM or SIGINT asks, and a second one ends the process at once. With several, JAX's preemption
    service takes a SIGTERM on any of them and chooses a step that all will reach.

    A step that is compiled may take minutes, in which no Python runs in the main thread. So a thread of its own answers
    the signal at once.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False
        self._previous: dict[int, Any] = {}
        self._answering = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Takes over the signals of a run with one process."""
        if jax.process_count() == 1:
            self._previous = {name: signal.signal(name, self._ask) for name in (signal.SIGTERM, signal.SIGINT)}
            self._answering.enter_context(_answered_at_once(self._previous))
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        self._answering.close()
        self._restore()

    def _restore(self) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def reached(self, step: int) -> bool:
        """Returns whether the run stops after this step. Every process calls it at every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked


@contextlib.contextmanager
def _answered_at_once(names: Iterable[int]) -> Iterator[None]:
    """Writes a line to standard error as soon as one of the signals arrives, whatever the main thread does."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    asking = set(names)

    def answer() -> None:
        while received := os.read(reader, 1):
            if received[0] in asking:
                with contextlib.suppress(OSError):
                    os.write(2, _NOTICE)
                return

    thread = threading.Thread(target=answer, name="answers signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
