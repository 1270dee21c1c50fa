"""Ends a run before its last step: on a signal that asks for it, or on a loss that is not finite."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

from vr_jax.errors import EXIT_NOT_FINITE, EXIT_PREEMPTED, UserError
from vr_jax.storage import write_json


class NonFiniteLoss(UserError):
    """The loss or the gradient is NaN or infinite; the message names the step and the samples of its batch."""

    exit_code = EXIT_NOT_FINITE


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


def stop_not_finite(step: int, loss: float, grad_norm: float, record_ids: list[str], workdir: Path) -> NoReturn:
    """Writes the samples of a bad batch to `<workdir>/non_finite_batch.json` and ends the run.

    Args:
        step: The step of the batch.
        loss: Its loss.
        grad_norm: The norm of its gradient.
        record_ids: Its samples on all processes.
        workdir: Folder of the run.

    Raises:
        NonFiniteLoss: Always.
    """
    path = workdir / "non_finite_batch.json"
    if jax.process_index() == 0:
        found = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "record_ids": record_ids}
        write_json(path, found)
    raise NonFiniteLoss(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; this step was not saved, the last checkpoint is good. "
        f"Samples of the batch (also in {path}): {', '.join(record_ids)}"
    )
