"""Turns the device's numbers of a step into the record of that step: losses, speed, utilisation."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax

from vr_jax.errors import UserError
from vr_jax.settings import TrainConfig
from vr_jax.training.flops import StepFlops, peak_flops
from vr_jax.training.not_finite import FiniteWatch
from vr_jax.training.progress import Progress
from vr_jax.training.step import Metrics
from vr_jax.training.trackers import Trackers

_STEPS_TO_AVERAGE = 20  # after so many steps the samples of an update are compared with what the config says
_FAR = 1.25  # a factor by which they may differ

logger = logging.getLogger("vr_jax.training")


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

    def __init__(
        self, config: TrainConfig, flops: StepFlops, watch: FiniteWatch, trackers: Trackers, progress: Progress
    ):
        """Starts the clock.

        Args:
            config: The settings of the run.
            flops: The operations of a step per unit of work.
            watch: What ends the run on a number that is not finite.
            trackers: Where the numbers go.
            progress: The progress bar.
        """
        self._config, self._flops, self._watch = config, flops, watch
        self._samples: list[float] = []
        self._trackers, self._progress = trackers, progress
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._pending: _Pending | None = None
        self._complete: tuple[int, dict[str, float | None]] | None = None
        self._losses: list[float] = []
        self._targets = 0.0
        self._completed = time.perf_counter()

    def push(self, step: int, metrics: Metrics, record_ids: tuple[tuple[str, ...], ...], waited: float) -> None:
        """Takes a step that has been dispatched, and writes the one before it.

        Args:
            step: The number of the step.
            metrics: Its numbers on the devices.
            record_ids: The samples of this process's rows.
            waited: Seconds that the loop waited for the batch.

        Raises:
            NotFinite: The step before has a loss or a gradient that is not finite.
        """
        self.flush()
        self._pending = _Pending(step, metrics, [name for row in record_ids for name in row], waited)

    def complete(self) -> None:
        """Waits for the step that is pending, and takes its numbers and its time.

        Raises:
            NotFinite: It has a loss or a gradient that is not finite.
        """
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        seconds = time.perf_counter() - self._completed
        self._completed += seconds
        self._watch.step(done.step, values["loss"], values["grad_norm"], done.record_ids)
        self._compare_samples(values["samples"])
        work = self._flops.total(**{unit: values[unit] for unit in ("tiles", "tokens", "pairs", "targets")})
        numbers: dict[str, float | None] = {
            **{
                name: None if name.startswith("loss/") and not values[f"targets/{name[5:]}"] else value
                for name, value in values.items()
                if name != "pairs"  # Pairs serve the count of operations.
            },
            "seconds": seconds,
            "tokens_per_s": values["tokens"] / seconds,
            "samples_per_s": values["samples"] / seconds,
            "data_wait": min(1.0, done.waited / seconds),
            "mfu": work / seconds / self._peak if self._peak else None,
        }
        self._losses.append(values["loss"])
        self._targets += values["targets"]
        self._complete = (done.step, numbers)

    def take(self) -> dict[str, float]:
        """Returns the numbers of the step that has not been written yet, which the caller writes later."""
        self.complete()
        assert self._complete is not None
        (_, numbers), self._complete = self._complete, None
        return {name: value for name, value in numbers.items() if value is not None}

    def flush(self, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Writes the step that has not been written yet, if there is one.

        Args:
            more: Further numbers of the step, which were measured since `complete`. Their time counts neither for this
                step nor for the next one.

        Raises:
            NotFinite: It has a loss or a gradient that is not finite.
        """
        self.complete()
        if self._complete is None:
            return
        (step, numbers), self._complete = self._complete, None
        if more:
            self._completed = time.perf_counter()
        self._trackers.write(step, {**numbers, **more})
        self._progress.update(step, {**numbers, **more})

    def _compare_samples(self, samples: float) -> None:
        """Says once whether updates hold as many samples as the settings say, where those set the number of updates."""
        if self._config.steps or len(self._samples) == _STEPS_TO_AVERAGE:
            return
        self._samples.append(samples)
        if len(self._samples) < _STEPS_TO_AVERAGE:
            return
        found, expected = sum(self._samples) / _STEPS_TO_AVERAGE, self._config.samples_per_step
        if not expected / _FAR <= found <= expected * _FAR:
            logger.warning(
                "an update holds %.1f samples where config.samples_per_step = %d: the run will see %.2f epochs of its "
                "data where config.epochs = %g",
                found,
                expected,
                self._config.epochs * found / expected,
                self._config.epochs,
            )

    def check_targets(self) -> None:
        """Ends a run in which nothing is learnt; a few batches without a target are allowed.

        Raises:
            UserError: No batch since the start of this process held a token that is a target.
        """
        if not self._targets:
            raise UserError(
                f"none of the first {len(self._losses)} batches holds a token that is a target, so nothing is learnt "
                "and nothing is saved: the answers of the samples are empty, or cut off by config.batch.tokens; "
                "`vr-jax prepare --check` shows the targets of the first samples"
            )

    def mean_loss_since_last_save(self) -> float:
        """Returns the mean loss of the steps written since the last call."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)
