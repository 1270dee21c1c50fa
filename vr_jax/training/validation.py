"""What is measured on held-out data while a run trains, with the parameters of the training on its own devices."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from vr_jax import distributed
from vr_jax.data.finite import make_finite_iterator
from vr_jax.data.processor import Processor
from vr_jax.data.selection import SelectedSource
from vr_jax.data.skips import SkipStatistics
from vr_jax.data.sources import Source, open_source
from vr_jax.errors import UserError
from vr_jax.evaluation import Benchmark, Evaluation, Evaluator, Item, ItemResult, NothingAsked, held_out_questions
from vr_jax.model.batch import BatchShape
from vr_jax.settings import LOSS, TrainConfig, ValidationSettings
from vr_jax.storage import Path
from vr_jax.training.inputs import Inputs, batch_shape, over_processes, put_batch
from vr_jax.training.program import TrainProgram
from vr_jax.training.run_record import VALIDATION_FOLDER
from vr_jax.training.state import ModelTree, TrainState
from vr_jax.training.step import LossStep, Metrics, make_loss_step
from vr_jax.training.trackers import Trackers

_COLUMNS = ("id", "question", "answers", "reply", "score")
_SHOWN = 16  # replies that trackers get
_AHEAD = 2  # batches that the devices may have before the host waits for one

logger = logging.getLogger("vr_jax.training")


@dataclass(frozen=True)
class Measured:
    """What was measured of a state.

    Attributes:
        value: The number.
        replies: The replies that it is the score of.
    """

    value: float
    replies: Sequence[ItemResult] = ()


class Measure(Protocol):
    """Measures one number on held-out data. All processes of a run call it together."""

    def __call__(self, state: TrainState, step: int) -> Measured:
        """Returns the number of a state, the same on all processes.

        Args:
            state: The state of the training.
            step: The number of updates done.
        """

    def try_out(self, state: TrainState) -> None:
        """Measures one batch, so that what cannot work ends a run at its start and not after hours."""


@dataclass(frozen=True)
class MeanLoss:
    """The mean cross-entropy over all targets of held-out samples, in nats.

    Every usable sample counts once, however the samples are divided into batches, devices and processes. Its memory is
    that of a micro-batch of the training, without gradients.

    Attributes:
        source: The samples.
        processor: Prepares a sample.
        shape: The sizes of the batches of this process.
        mesh: The devices.
        program: The jitted loss.
        max_skipped: The share of unusable samples above which the run ends.
    """

    source: Source
    processor: Processor
    shape: BatchShape
    mesh: Mesh
    program: LossStep
    max_skipped: float

    def __call__(self, state: TrainState, step: int) -> Measured:
        """Returns the loss; see `Measure`."""
        del step
        loss, targets = self._sums(state)
        if not targets:
            raise UserError(
                "none of the samples has a token that is a target, so there is no loss; their answers are empty, or "
                "cut off by config.batch.tokens"
            )
        return Measured(loss / targets)

    def try_out(self, state: TrainState) -> None:
        """Measures one batch; see `Measure`."""
        self._sums(state, batches=1)

    def _sums(self, state: TrainState, batches: int | None = None) -> tuple[float, float]:
        """The sum of the losses and the number of the targets of some batches, or of all, over all processes."""
        statistics = SkipStatistics(self.max_skipped)
        waiting: list[Metrics] = []
        sums = {"loss": 0.0, "targets": 0.0}

        def take(keep: int) -> None:
            while len(waiting) > keep:
                found = jax.device_get(waiting.pop(0))
                for name in sums:
                    sums[name] += float(found[name])

        with closing(
            make_finite_iterator(
                self.source,
                self.processor,
                self.shape,
                process_index=distributed.process_index(),
                process_count=distributed.process_count(),
                max_batches=batches,
            )
        ) as iterator:
            for batch in iterator:
                statistics.update(batch)
                waiting.append(self.program(state, put_batch(batch.batch, self.mesh)))
                take(_AHEAD)
        take(0)
        # The one batch that is tried out at the start says too little of the samples behind it for the rule of an end.
        skips = over_processes(statistics)
        distributed.together(lambda: skips.check(final=skips.used + skips.skipped >= len(self.source)))
        return sums["loss"], sums["targets"]


@dataclass(frozen=True)
class ReplyScore:
    """The score, from 0 to 100, of greedy replies to questions (`vr_jax.evaluation`).

    The parameters answer as they lie on the devices; there is no second copy of them.

    Attributes:
        evaluator: Answers and scores.
        benchmark: The benchmark.
        items: Its questions.
        settings: The numbers of the evaluation.
        tree: The model's parameters.
        output: The folder that gets a folder of results for each update.
    """

    evaluator: Evaluator
    benchmark: Benchmark
    items: Sequence[Item]
    settings: ValidationSettings
    tree: ModelTree
    output: Path

    def __call__(self, state: TrainState, step: int) -> Measured:
        """Returns the score; see `Measure`."""
        found = self._evaluate(state, self.items, self.output / str(step))
        return Measured(found.summary["score"], found.results)

    def try_out(self, state: TrainState) -> None:
        """Answers one batch; see `Measure`."""
        items = self.benchmark.limited(self.items, self.settings.batch_size)
        try:
            self._evaluate(state, items, None)
        except NothingAsked as error:
            if len(items) == len(self.items):
                raise
            logger.warning("the first questions say nothing about the others: %s", error)

    def _evaluate(self, state: TrainState, items: Sequence[Item], output: Path | None) -> Evaluation:
        return self.evaluator.evaluate(
            self.tree.build({**state.frozen, **state.params}),
            self.benchmark,
            items,
            output=output,
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
        )


@dataclass(frozen=True)
class Validation:
    """Everything that a run measures on held-out data.

    Attributes:
        settings: The settings of each measurement, by name.
        measures: What measures it, by the same names.
        total: The number of updates of the run, the last of which is always measured.
    """

    settings: Mapping[str, ValidationSettings]
    measures: Mapping[str, Measure]
    total: int

    def due(self, step: int) -> list[str]:
        """Returns the names of what is measured after an update."""
        return [name for name, one in self.settings.items() if step % one.every == 0 or step == self.total]

    def try_out(self, state: TrainState) -> None:
        """Measures one batch of everything before the training, which also compiles the programs."""
        for name, measure in self.measures.items():
            begin = time.perf_counter()
            with _named(name):
                measure.try_out(state)
            logger.info("config.validation.%s: one batch was tried in %.1f s", name, time.perf_counter() - begin)

    def measure(self, names: Sequence[str], state: TrainState, step: int, trackers: Trackers) -> dict[str, float]:
        """Measures a state.

        Args:
            names: What is measured.
            state: The state of the training.
            step: The number of updates done.
            trackers: Get the first replies as a table; the caller gives them the numbers.

        Returns:
            The numbers by their names in the metrics, and `validation_seconds`. One that is not finite is told and left
            out.
        """
        begin, values = time.perf_counter(), {}
        for name in names:
            metric = self.settings[name].metric_name(name)
            with _named(name):
                found = self.measures[name](state, step)
            if math.isfinite(found.value):
                values[metric] = found.value
            else:
                logger.warning("step %d: %s is %s", step, metric, found.value)
            if found.replies:
                trackers.table(
                    step, f"validation/{name}/replies", _COLUMNS, [_row(one) for one in found.replies[:_SHOWN]]
                )
        seconds = time.perf_counter() - begin
        logger.info(
            "step %d: %s (%.1f s)", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()), seconds
        )
        return {**values, "validation_seconds": seconds}


def _row(reply: ItemResult) -> tuple[str | float | None, ...]:
    return reply.id, reply.question, " | ".join(reply.answers), reply.prediction, reply.score


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Makes an error say which settings it comes from."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"config.validation.{name}: {error}") from error


def open_validation(
    config: TrainConfig, program: TrainProgram, inputs: Inputs, workdir: Path, total: int
) -> Validation:
    """Opens the held-out data of a run.

    Args:
        config: The settings of the run.
        program: The computation of the run.
        inputs: The training data, with the processor of its samples.
        workdir: Folder of the run.
        total: The number of updates of the run.

    Raises:
        UserError: The data cannot be opened.
    """
    measures: dict[str, Measure] = {}
    evaluator = functools.cache(lambda: Evaluator(_of_chat(inputs)))  # one for all, which compiles once
    loss_step = make_loss_step(program.tree, program.mesh, loss_chunk=config.loss_chunk)
    for name, settings in config.validation.items():
        if inputs.processor is None:
            raise ValueError(f"config.validation.{name}: the inputs of this run have no processor")
        with _named(name):
            if settings.metric == LOSS:
                measures[name] = _mean_loss(settings, config, program, inputs.processor, loss_step)
            else:
                measures[name] = _reply_score(name, settings, program.tree, evaluator(), workdir)
    return Validation(config.validation, measures, total)


def _of_chat(data: Inputs) -> Processor:
    """The processor that later evaluations of the exported model will use."""
    assert data.processor is not None
    return Processor(data.processor.tokenizer, data.processor.config)


def _reply_score(
    name: str, settings: ValidationSettings, tree: ModelTree, evaluator: Evaluator, workdir: Path
) -> ReplyScore:
    one = settings.source
    benchmark, items = held_out_questions(
        name,
        settings.metric,
        one.path,
        images=one.images,
        split=one.split,
        follow_links=one.follow_links,
        limit=settings.batches * settings.batch_size or None,
    )
    return ReplyScore(evaluator, benchmark, items, settings, tree, workdir / VALIDATION_FOLDER / name)


def _mean_loss(
    settings: ValidationSettings,
    config: TrainConfig,
    program: TrainProgram,
    processor: Processor,
    loss_step: LossStep,
) -> MeanLoss:
    one = settings.source
    source = open_source(
        one.path,
        images=one.images or None,
        format=one.format or None,
        split=one.split or "validation",
        follow_links=one.follow_links,
    )
    shape = batch_shape(config, distributed.process_count() * config.batch.accumulation)
    if settings.batches:
        # As many samples as these batches have rows, so that they are the same on any number of processes.
        samples = settings.batches * config.batch.rows // config.batch.accumulation
        source = SelectedSource(source, np.arange(min(samples, len(source))))
    return MeanLoss(source, processor, shape, program.mesh, loss_step, max_skipped=config.data.max_skipped)
