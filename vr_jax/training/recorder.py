"""Turns the device's numbers of a step into the record of that step: losses, speed, utilisation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from vr_jax import distributed
from vr_jax.training.flops import StepFlops, peak_flops
from vr_jax.training.metrics import MetricsWriter, Progress
from vr_jax.training.step import Metrics
from vr_jax.training.stopping import stop_not_finite


@dataclass
class _Pending:
    """A step that has been dispatched and not been written."""

    step: int
    metrics: Metrics
    record_ids: list[str]
    waited: float


class Recorder:
    """Writes the numbers of a step when the next one has been dispatched, so that the devices never wait for the host.

    The time of a step is that from the completion of the one before it to its own.
    """

    def __init__(self, flops: StepFlops, workdir: Path, writer: MetricsWriter, progress: Progress):
        """Starts the clock.

        Args:
            flops: The operations of a step per unit of work.
            workdir: Folder of the run.
            writer: Where the records go.
            progress: The progress bar.
        """
        self._flops, self._workdir = flops, workdir
        self._writer, self._progress = writer, progress
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._pending: _Pending | None = None
        self._losses: list[float] = []
        self._completed = time.perf_counter()

    def push(self, step: int, metrics: Metrics, record_ids: tuple[tuple[str, ...], ...], waited: float) -> None:
        """Takes a step that has been dispatched, and writes the one before it.

        Args:
            step: The number of the step.
            metrics: Its numbers on the devices.
            record_ids: The samples of this process's rows.
            waited: Seconds that the loop waited for the batch.

        Raises:
            NonFiniteLoss: The step before has a loss or a gradient that is not finite.
        """
        self.flush()
        self._pending = _Pending(step, metrics, [name for row in record_ids for name in row], waited)

    def flush(self) -> None:
        """Writes the step that is still pending.

        Raises:
            NonFiniteLoss: It has a loss or a gradient that is not finite.
        """
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        seconds = time.perf_counter() - self._completed
        self._completed += seconds
        loss, grad_norm = values["loss"], values["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            ids = [name for part in distributed.gather(done.record_ids) for name in part]
            stop_not_finite(done.step, loss, grad_norm, ids, self._workdir)
        work = self._flops.total(**{unit: values[unit] for unit in ("tiles", "tokens", "pairs", "targets")})
        numbers: dict[str, float | None] = {
            **{name: values[name] for name in ("loss", "lr", "grad_norm", "samples", "tokens", "targets", "tiles")},
            "seconds": seconds,
            "tokens_per_s": values["tokens"] / seconds,
            "samples_per_s": values["samples"] / seconds,
            "data_wait": min(1.0, done.waited / seconds),
            "mfu": work / seconds / self._peak if self._peak else None,
        }
        self._losses.append(loss)
        self._writer.write(done.step, numbers)
        self._progress.update(done.step, numbers)

    def mean_loss_since_last_save(self) -> float:
        """Returns the mean loss of the steps written since the last call."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)
