"""The training loop: set up, resume, step, record, save, export. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vr_jax import sharding
from vr_jax.data.skips import SkipStatistics
from vr_jax.distributed import gather
from vr_jax.errors import UserError
from vr_jax.model_directory import save_model, warm_start
from vr_jax.settings import ProfileSettings, TrainConfig
from vr_jax.training import inputs
from vr_jax.training.checkpoint import Checkpoints, Restored
from vr_jax.training.flops import StepFlops, peak_flops, step_flops
from vr_jax.training.metrics import MetricsWriter, Progress
from vr_jax.training.program import TrainProgram, build_program, total_steps
from vr_jax.training.state import ModelTree, TrainState, create_state
from vr_jax.training.step import Metrics
from vr_jax.training.stopping import Preempted, Preemption, stop_not_finite

EXPORT_FOLDER, PROFILE_FOLDER = "model", "profile"

logger = logging.getLogger("vr_jax.training")

OpenInputs = Callable[[TrainConfig, Mesh, Path], inputs.Inputs]


def train(config: TrainConfig, workdir: Path, *, open_inputs: OpenInputs = inputs.open_inputs) -> None:
    """Runs a recipe (`recipe.base`) to its last step, continuing from the newest checkpoint in `workdir` if there is
    one, and writes the final model directory `<workdir>/model`.

    What the parameters start from, in this order: the newest undamaged checkpoint in `workdir`; the model directories
    of `config.init_from`, and random values for what these lack. All processes of a multi-host run call this.

    Raises ConfigError, OptimizerError, TrainableError, ShardingError, InputError, UserError or
    CheckpointError for settings that cannot work; TooManySkips, NonFiniteLoss and Preempted when a run ends early."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    tree = ModelTree(config.model)
    tree.trainable(config.trainable)  # a glob that matches nothing is refused before the data are opened
    for line in sharding.unsharded(tree.shapes, mesh):
        logger.warning("%s, kept whole", line)
    data = open_inputs(config, mesh, workdir)
    total = total_steps(config, data.samples)
    program = build_program(config, mesh, total, tree)
    abstract = program.abstract

    first = jax.process_index() == 0
    skip_statistics = SkipStatistics(max_fraction=config.data.max_skipped)
    saved = config.checkpoint
    with (
        contextlib.closing(data.iterator),
        jax.set_mesh(mesh),
        Checkpoints(workdir, keep_last=saved.keep_last, keep_best=saved.keep_best) as checkpoints,
        Preemption() as preemption,
    ):
        restored = checkpoints.restore_newest(abstract)
        if restored is not None:
            start, state = restored.step, restored.state
            _resume(restored, config, data.iterator, skip_statistics)
        else:
            start, state = 0, _start(config, program)
        _describe(config, abstract, mesh, data.samples, start, total)

        with (
            MetricsWriter(workdir, resume_step=start, tensorboard=config.tensorboard, active=first) as writer,
            Progress(start=start, total=total, active=first) as progress,
        ):
            record = Recorder(step_flops(program.model, program.trainable), data.samples, workdir, writer, progress)
            for step in range(start + 1, total + 1):
                _profile(config.profile, step, workdir, before=True)
                waited = time.perf_counter()
                host_batch = next(data.iterator)
                waited = time.perf_counter() - waited
                skip_statistics.update(host_batch)
                skip_statistics.check()

                batch = inputs.put_batch(host_batch.batch, mesh)
                state, metrics = program.step(state, batch)
                record.push(step, metrics, host_batch.record_ids, waited)

                _profile(config.profile, step, workdir, before=False, result=metrics)
                checkpoints.poll()
                stop = preemption.reached(step)
                if stop or step == total or step % saved.every == 0:
                    record.flush()  # so that a state after a bad step is never saved
                    run = {"config": config.to_dict(), "skip_statistics": skip_statistics.get_state()}
                    loss = record.mean_loss_since_last_save()
                    checkpoints.save(step, state, data=data.iterator.get_state(), run=run, loss=loss)
                if stop and step < total:
                    checkpoints.wait()
                    raise Preempted(f"asked to stop: saved step {step} of {total}; the same command continues")
        if start < total:
            skip_statistics.check(final=True)
        checkpoints.wait()
        export_state(workdir, program.tree, state, data.tokenizer_dir)


def _start(config: TrainConfig, program: TrainProgram) -> TrainState:
    """A new run: parameters from model directories, fresh ones for the rest."""
    directories = inputs.init_directories(config)
    model, report = warm_start(
        directories, program.model, program.mesh, seed=config.seed, allow_unused=config.allow_unused
    )
    if directories:
        fresh = ", ".join(report.initialised) or "nothing"
        logger.info("took %d parameters from %s; initialised: %s", len(report.loaded), config.init_from, fresh)
    else:
        logger.info("config.init_from is empty: all parameters start random")
    return create_state(program.tree, program.optimizer, program.abstract, model)


def _resume(
    restored: Restored, config: TrainConfig, iterator: inputs.BatchIterator, skip_statistics: SkipStatistics
) -> None:
    """Puts data and skip statistics back to where the checkpoint was written."""
    old, new = _flat(restored.run["config"]), _flat(config.to_dict())
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            logger.warning(
                "config.%s was %s when the checkpoint was written, now %s", name, old.get(name), new.get(name)
            )
    try:
        iterator.set_state(restored.data)
    except UserError as error:
        raise UserError(
            f"cannot continue from step {restored.step}: {error}. Use the data settings of the run, or start a new one"
        ) from error
    skip_statistics.set_state(restored.run["skip_statistics"])
    logger.info("continuing from step %d", restored.step)


def _describe(config: TrainConfig, abstract: TrainState, mesh: Mesh, samples: int, start: int, total: int) -> None:
    def count(params: dict[str, Any]) -> float:
        return sum(math.prod(leaf.shape) for leaf in params.values()) / 1e6

    logger.info(
        "%.2f M parameters trained, %.2f M frozen; mesh %s on %s; steps %d..%d, %d samples, about %g per step",
        count(abstract.params),
        count(abstract.frozen),
        " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        mesh.devices.flat[0].device_kind,
        start + 1,
        total,
        samples,
        config.samples_per_step,
    )


@dataclass
class _Pending:
    step: int
    metrics: Metrics
    record_ids: list[str]
    waited: float


class Recorder:
    """Writes each step's numbers when the next step has been dispatched, so that the devices never wait for the host.

    Time is taken from the completion of one step to that of the next."""

    def __init__(self, flops: StepFlops, samples: int, workdir: Path, writer: MetricsWriter, progress: Progress):
        self._flops, self._samples, self._workdir = flops, samples, workdir
        self._writer, self._progress = writer, progress
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._pending: _Pending | None = None
        self._losses: list[float] = []
        self._completed = time.perf_counter()

    def push(self, step: int, metrics: Metrics, record_ids: tuple[tuple[str, ...], ...], waited: float) -> None:
        """Takes a dispatched step and writes the one before. Raises NonFiniteLoss for that one."""
        self.flush()
        self._pending = _Pending(step, metrics, [name for row in record_ids for name in row], waited)

    def flush(self) -> None:
        """Writes the step that is still pending. Raises NonFiniteLoss."""
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        seconds = time.perf_counter() - self._completed
        self._completed += seconds
        loss, grad_norm = values["loss"], values["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            ids = [name for part in gather(done.record_ids) for name in part]
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
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)


def _profile(profile: ProfileSettings, step: int, workdir: Path, *, before: bool, result: Any = None) -> None:
    """Starts the trace before its first step and ends it after its last."""
    if not profile.steps:
        return
    if before and step == profile.first_step:
        jax.profiler.start_trace(str(workdir / PROFILE_FOLDER))
    if not before and step == profile.first_step + profile.steps - 1:
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        logger.info("profiler trace of steps %d..%d in %s", profile.first_step, step, workdir / PROFILE_FOLDER)


def export_state(workdir: Path, tree: ModelTree, state: TrainState, tokenizer_dir: Path | None) -> None:
    """Writes `<workdir>/model`, which chat, eval and the next phase's `init_from` read."""
    target = workdir / EXPORT_FOLDER
    save_model(target, tree.build({**state.frozen, **state.params}), tokenizer_dir, overwrite=True)
    logger.info("model directory: %s", target)


def export_newest(config: TrainConfig, workdir: Path) -> None:
    """Writes `<workdir>/model` from the newest undamaged checkpoint, without training. Raises as `train` does."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    program = build_program(config, mesh, 1)  # the schedule's end does not matter here
    with jax.set_mesh(mesh), Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_newest(program.abstract)
        if restored is None:
            raise UserError(f"{workdir} has no checkpoint to export")
        logger.info("exporting step %d", restored.step)
        export_state(workdir, program.tree, restored.state, inputs.tokenizer_directory(config, workdir))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from leaves(part, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    return dict(leaves(value, prefix))
