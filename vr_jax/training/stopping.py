"""Ends a run before its last step on a signal that asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from vr_jax.errors import EXIT_PREEMPTED, UserError


class Preempted(UserError):
    """The run was asked to stop and has saved its state; the same command continues it."""

    exit_code = EXIT_PREEMPTED


class Preemption:
    """Notices that the run is asked to stop, with the same answer on every process at the same step.

    With one process, SIGTERM or SIGINT asks, and a second one ends the process at once. With several, JAX's preemption
    service takes a SIGTERM on any of them and chooses a step that all will reach.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Takes over the signals of a run with one process."""
        if jax.process_count() == 1:
            self._previous = {name: signal.signal(name, self._ask) for name in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
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
