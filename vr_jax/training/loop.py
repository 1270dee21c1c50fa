"""The training loop: set up, resume, step, record, save, export. `train` reads from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vr_jax import distributed, sharding
from vr_jax.data.batch_page import batch_images, batch_page
from vr_jax.data.skips import SkipStatistics
from vr_jax.data.types import HostBatch
from vr_jax.errors import ConfigError, UserError
from vr_jax.failures import first_error_kept
from vr_jax.model.parameters import merged_path
from vr_jax.model_directory import stored_params, warm_start
from vr_jax.processes.supervisor import report_start
from vr_jax.settings import DEMO, LOSS, TrainConfig
from vr_jax.storage import STALE_AFTER, Path, as_path, directory_lock, refuse_s3, write_bytes
from vr_jax.training import inputs
from vr_jax.training.batch_size import fit_batch
from vr_jax.training.checkpoint import Checkpoints, Restored, check_room, has_checkpoints
from vr_jax.training.export import export_state, generation_settings
from vr_jax.training.flops import step_flops
from vr_jax.training.goodput import Goodput
from vr_jax.training.input_waits import EVERY, InputWaits
from vr_jax.training.not_finite import FiniteWatch
from vr_jax.training.profiling import Profiler
from vr_jax.training.program import TrainProgram, build_program, check_globs, choose_run_mesh, total_steps
from vr_jax.training.progress import Progress
from vr_jax.training.recorder import Recorder
from vr_jax.training.run_record import (
    BEST_EXPORT_FOLDER,
    FIRST_BATCH_FILE,
    check_data,
    claim,
    flat_settings,
    run_facts,
    write_run_record,
)
from vr_jax.training.start_log import log_start
from vr_jax.training.state import ModelTree, TrainState, create_state
from vr_jax.training.stopping import Preempted, Preemption, check_still_ours
from vr_jax.training.trackers import CaptionedImage, Trackers, check_trackers, open_trackers
from vr_jax.training.validation import open_validation

# A run that is restarted because its host was lost waits until the lease of the lost process is stale.
_WAIT_FOR_WORKDIR = 1.2 * STALE_AFTER

logger = logging.getLogger("vr_jax.training")

OpenInputs = Callable[[TrainConfig, Mesh, Path], inputs.Inputs]


def train(config: TrainConfig, workdir: Path, *, open_inputs: OpenInputs = inputs.open_inputs) -> None:
    """Trains to the last step and writes the final model directory, `<workdir>/model`.

    The run continues from the newest undamaged checkpoint in the workdir. Without one, the parameters come from the
    model directories of `config.init_from`, and those that none of them holds are random. All processes of a run on
    several hosts call this function.

    Args:
        config: The settings of the run.
        workdir: Folder of the run, on storage that all its processes see.
        open_inputs: Opens the training data; tests give their own.

    Raises:
        UserError: The settings, data, weights or checkpoints cannot be used. Of its subclasses, `TooManySkips`,
            `NotFinite` and `Preempted` end a run that has begun.
    """
    # Of several processes one may lack a file or have other settings. Each part of the start that needs no other
    # process is done in `together`, so that all of them end with the error of one.
    workdir, chosen, tree = distributed.together(lambda: _set_up(config, workdir))
    mesh = chosen.mesh
    fit = distributed.together(lambda: fit_batch(config, mesh.shape["replica"], mesh.shape["fsdp"]))
    config = fit.config
    distributed.check_same({"config": config.to_dict(), "workdir": str(workdir)})

    with (
        directory_lock(workdir, wait=_WAIT_FOR_WORKDIR) as lease,
        distributed.at_end(lease.release if lease else None),
        distributed.told(),
    ):
        run = distributed.together(lambda: claim(workdir, _sources(config)) if distributed.is_first() else "")
        data = distributed.together(lambda: open_inputs(config, mesh, workdir))
        saved = config.checkpoint
        with (
            Goodput(workdir, active=distributed.is_first()) as goodput,
            first_error_kept(data.iterator.close),
            jax.set_mesh(mesh),
            Checkpoints(workdir, keep_last=saved.keep_last, keep_best=saved.keep_best, best=saved.best) as checkpoints,
            Preemption() as preemption,
            distributed.told(),
        ):
            total = total_steps(config, data.samples)
            program = distributed.together(lambda: build_program(config, mesh, total, tree, data.sources))
            validation = distributed.together(lambda: open_validation(config, program, data, workdir, total))
            skip_statistics = SkipStatistics(max_fraction=config.data.max_skipped)
            with goodput.spend("restoring"):
                restored = checkpoints.restore_newest(program.abstract)
            start = restored.step if restored is not None else 0
            if distributed.is_first():
                report_start(start)
            watch = FiniteWatch(config, workdir, mesh, start=start, newest_checkpoint=checkpoints.newest_complete)
            _check_end(start, total, config, data.samples, checkpoints.directory)
            distributed.together(lambda: _check_start(workdir, config, program, data, start, total))
            if restored is not None:
                state = restored.state
                distributed.together(lambda: _resume(restored, config, data.iterator, skip_statistics))
            else:
                state = _initial_state(config, program)
                watch.parameters(0, {**state.params, **state.frozen}, "trained")
            goodput.continues(start)
            if start == total:
                logger.info("finished: step %d is the last of the run, nothing is left to train", start)
                watch.parameters(start, state.params, "exported")
                if restored is None or restored.unwritten is None:
                    export_state(workdir, program.tree, state, data.tokenizer_dir, owner=run, config=config)
                    _tell_best(checkpoints, config, workdir, total)
                    return
            rules = {"mesh_rule": chosen.rule, "batch": fit.rule}
            write_run_record(
                workdir, config, program, step=start, total_steps=total, rules=rules, run=run, data=data.data
            )
            log_start(config, program, samples=data.samples, start=start, total=total, **rules)

            first = distributed.is_first()
            # The numbers of a step that are not written yet are written below, also where an earlier start, which ended
            # before its next checkpoint, has done so already.
            written = start if restored is None or restored.unwritten is None else start - 1
            with (
                open_trackers(config, workdir, resume_step=written, identity=run, active=first) as trackers,
                Progress(start=start, total=total, active=first) as progress,
                Profiler(config.profile, workdir, start=start, total=total) as profiler,
            ):
                with goodput.spend("validation"):
                    validation.try_out(state)
                if restored is not None and restored.unwritten is not None:
                    due = validation.due(start)
                    values = validation.measure(due, state, start, trackers) if due else {}
                    trackers.write(start, {**restored.unwritten, **values})
                recorder = Recorder(config, step_flops(program.model, program.trainable), watch, trackers, progress)
                goodput.stepping()
                waits = InputWaits(config, data.sources)
                for step in range(start + 1, total + 1):
                    profiler.before(step)
                    waited = time.perf_counter()
                    with goodput.spend("data"):
                        host_batch = next(data.iterator)
                    waited = time.perf_counter() - waited
                    waits.add(waited, host_batch)
                    skip_statistics.update(host_batch)
                    if distributed.process_count() == 1:
                        skip_statistics.check()

                    batch = inputs.put_batch(host_batch.batch, mesh)
                    if step == start + 1:
                        distributed.together(partial(_show_first_batch, workdir, host_batch, data, step, trackers))
                    # Everything that the update reads is on the devices: a transfer here would slow each update down.
                    with (
                        goodput.spend("compiling" if step == start + 1 else "steps"),
                        StepTraceAnnotation("train", step_num=step),
                        jax.transfer_guard("disallow"),
                    ):
                        state, metrics = program.step(state, batch)
                    recorder.push(step, metrics, host_batch.record_ids, waited)
                    goodput.stepped(step)

                    profiler.after(step, metrics)
                    checkpoints.poll()
                    stop = preemption.reached(step)
                    # What asks a run to stop may not wait for a validation; the next start makes up for it.
                    due = validation.due(step)
                    unwritten = recorder.take() if due and stop and step < total else None
                    saving = stop or step == total or step % saved.every == 0
                    compared = waits.exchange(step) if saving or step % EVERY == 0 else {}
                    measured: dict[str, float] = {}
                    if due and unwritten is None:
                        recorder.complete()
                        with goodput.spend("validation"):
                            measured = validation.measure(due, state, step, trackers)
                    if measured or compared:
                        recorder.flush({**measured, **compared})
                    if saving:
                        # A state that is not finite is never saved, and so never exported. Of several processes one may
                        # have too many unusable samples: all learn it here, since none may leave the others waiting.
                        distributed.together(partial(check_still_ours, lease))
                        recorder.flush()
                        recorder.check_targets()
                        watch.parameters(step, state.params, "saved or exported")
                        skips = inputs.over_processes(skip_statistics)
                        distributed.together(skips.check)
                        trackers.flush()
                        goodput.saved(step)
                        with goodput.spend("saving"):
                            checkpoints.save(
                                step,
                                state,
                                data=data.iterator.get_state(),
                                config=config.to_dict(),
                                skip_statistics=skips.get_state(),
                                metrics={LOSS: recorder.mean_loss_since_last_save(), **measured},
                                unwritten=unwritten,
                            )
                    if stop and step < total:
                        with goodput.spend("saving"):
                            checkpoints.finish()
                        raise distributed.agreed(
                            Preempted(f"asked to stop: saved step {step} of {total}; the same command continues")
                        )
            skips = inputs.over_processes(skip_statistics)
            distributed.together(lambda: skips.check(final=True))
            with goodput.spend("saving"):
                checkpoints.finish()
                export_state(workdir, program.tree, state, data.tokenizer_dir, owner=run, config=config)
            _tell_best(checkpoints, config, workdir, total)


def _tell_best(checkpoints: Checkpoints, config: TrainConfig, workdir: Path, total: int) -> None:
    """Says which checkpoint is best, where that is not the last one, which was exported."""
    best = checkpoints.best() if config.checkpoint.keep_best else None
    if best is not None and best[0] < total:
        logger.info(
            "the best checkpoint is that of step %d, with %s %.4f; --export_best writes it as %s",
            *(best[0], config.checkpoint.best, best[1], workdir / BEST_EXPORT_FOLDER),
        )


def _show_first_batch(workdir: Path, batch: HostBatch, data: inputs.Inputs, step: int, trackers: Trackers) -> None:
    """Writes the page of the first batch of this start, which shows what is trained on, and gives it to trackers."""
    if not distributed.is_first() or data.processor is None:
        return
    path = workdir / FIRST_BATCH_FILE
    page = batch_page(batch, data.processor.tokenizer, step=step, facts=run_facts(workdir))
    write_bytes(path, page.encode())
    trackers.page(step, "first_batch", page)
    trackers.images(step, "first_batch", [CaptionedImage(png, caption) for png, caption in batch_images(batch)])
    logger.info("the first batch as a page: %s", path)


def _set_up(config: TrainConfig, workdir: Path) -> tuple[Path, sharding.ChosenMesh, ModelTree]:
    """What can be refused before anything is written: paths, devices, model directories, globs without a match."""
    workdir = as_path(workdir, "workdir").absolute()
    refuse_s3(workdir, "workdir")
    tree = ModelTree(config.model)
    stored = check_globs(config, tree)
    chosen = choose_run_mesh(config, stored)
    if not has_checkpoints(workdir):  # A run that continues does not read them.
        for directory in inputs.init_directories(config):
            stored_params(directory)
    for line in sharding.unsharded(stored.shapes, chosen.mesh):
        logger.warning("%s, kept whole", line)
    return workdir, chosen, tree


def _check_has_checkpoint(workdir: Path) -> None:
    if not has_checkpoints(workdir):
        raise _no_checkpoint(workdir)


def _no_checkpoint(workdir: Path) -> UserError:
    return UserError(f"{workdir} has no checkpoint to export; give the --workdir of a run that has saved one")


def _sources(config: TrainConfig) -> list[Path]:
    """The model directories that the run reads, and the folder of its tokenizer."""
    tokenizer = [as_path(config.tokenizer)] if config.tokenizer not in ("", DEMO) else []
    return [*inputs.init_directories(config), *tokenizer]


def _check_start(
    workdir: Path, config: TrainConfig, program: TrainProgram, data: inputs.Inputs, start: int, total: int
) -> None:
    """Makes sure that the run can be written to its end, and that its data are those that it began with."""
    if not distributed.is_first():
        return
    if data.tokenizer_dir is not None:
        # Its settings are exported; one that is refused is found now.
        generation_settings(config.model, data.tokenizer_dir)
    check_trackers(config)
    if start:
        check_data(workdir, config, data.data, start)
    exported = sum(4 * math.prod(leaf.shape) for leaf in ModelTree(config.model).shapes.values())  # it holds float32
    saves = math.ceil(max(0, total - start) / config.checkpoint.every)
    check_room(workdir, config.checkpoint, program.abstract, exported, saves)


def _initial_state(config: TrainConfig, program: TrainProgram) -> TrainState:
    """The state of a new run, with parameters from model directories and random ones for the rest."""
    directories = inputs.init_directories(config)
    distributed.together(lambda: [stored_params(directory) for directory in directories])
    model, report = warm_start(
        directories,
        program.model,
        program.mesh,
        dtype=_loaded_types(program).__getitem__,
        seed=config.seed,
        allow_unused=config.allow_unused,
        allow_different=config.allow_different,
    )
    if directories:
        random = ", ".join(report.initialised) or "nothing"
        logger.info("took %d parameters from %s; initialised: %s", len(report.loaded), config.init_from, random)
    else:
        logger.info("config.init_from is empty: all parameters start random")
    return create_state(program.tree, program.optimizer, program.abstract, model, seed=config.seed)


def _loaded_types(program: TrainProgram) -> dict[str, DTypeLike]:
    """The type in which each parameter of the plain model is loaded, by merged path: no wider than it is kept."""
    tree, trained = program.tree, set(program.trainable)
    types: dict[str, DTypeLike] = {}
    for path in ModelTree(tree.config).shapes:
        merged = merged_path(path)
        frozen = program.abstract.frozen.get(path)
        if path in trained or (frozen is not None and frozen.dtype == jnp.float32):
            types[merged] = jnp.float32
        types.setdefault(merged, jnp.bfloat16)
    return types


def _samples(position: Any) -> int | None:
    """The number of records that the state of an iterator belongs to, where it names one."""
    return position.get("identity", {}).get("samples") if isinstance(position, dict) else None


def _resume(
    restored: Restored, config: TrainConfig, iterator: inputs.BatchIterator, skip_statistics: SkipStatistics
) -> None:
    """Puts data and skip statistics back to where the checkpoint was written, and logs the settings that changed."""
    old, new = flat_settings(restored.config), flat_settings(config.to_dict())
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            logger.warning(
                "config.%s was %s when the checkpoint was written, now %s", name, old.get(name), new.get(name)
            )
    before, now = _samples(restored.data[0]), _samples(iterator.get_state())
    try:
        if config.data.allow_changed and before != now:
            logger.warning("there were %s records, now %s: they are read from their beginning", before, now)
        else:
            iterator.set_state(restored.data)
    except UserError as error:
        raise UserError(
            f"cannot continue from step {restored.step}: {str(error).removesuffix('.')}. Use the data settings of the "
            "run, or start a new one"
        ) from error
    # They are those of all processes. The first one continues them, and the others count what is new.
    skip_statistics.set_state(restored.skip_statistics, counts=distributed.is_first())
    logger.info("continuing from step %d", restored.step)


def _check_end(step: int, total: int, config: TrainConfig, samples: int, folder: Path) -> None:
    """Raises ConfigError where a run would end before the checkpoint that it continues from."""
    if step <= total:
        return
    if config.steps:
        found = f"config.steps = {config.steps}"
    else:
        found = f"config.epochs = {config.epochs:g} of {samples} samples, which are {total} updates"
    raise ConfigError(
        f"{found}: the checkpoint in {folder} is at step {step}, beyond the end of the run; raise it to {step} or "
        "more, or use another workdir"
    )


def export_newest(config: TrainConfig, workdir: Path) -> None:
    """Writes `<workdir>/model` from the newest undamaged checkpoint, without training.

    Args:
        config: The settings of the run.
        workdir: Folder of the run.

    Raises:
        UserError: There is no checkpoint, or none that can be used with these settings.
    """
    _export(config, workdir, best=False)


def export_best(config: TrainConfig, workdir: Path) -> None:
    """Writes `<workdir>/model_best` from the checkpoint that is best by `config.checkpoint.best`, without training.

    Args:
        config: The settings of the run.
        workdir: Folder of the run.

    Raises:
        UserError: There is no checkpoint at which that number was measured, or it cannot be used with these settings.
    """
    _export(config, workdir, best=True)


def _export(config: TrainConfig, workdir: Path, *, best: bool) -> None:
    workdir, (mesh, *_), tree = distributed.together(lambda: _set_up(config, workdir))
    distributed.check_same({"config": config.to_dict(), "workdir": str(workdir)})
    distributed.together(lambda: _check_has_checkpoint(workdir))
    # The end of the schedule does not matter here.
    program = distributed.together(lambda: build_program(config, mesh, 1, tree))
    saved = config.checkpoint
    with (
        directory_lock(workdir, wait=_WAIT_FOR_WORKDIR),
        jax.set_mesh(mesh),
        Checkpoints(workdir, best=saved.best) as checkpoints,
        distributed.told(),
    ):
        run = distributed.together(lambda: claim(workdir, ()) if distributed.is_first() else "")
        if best:
            found = checkpoints.best()
            if found is None:
                raise UserError(
                    f"no checkpoint in {checkpoints.directory} has the number config.checkpoint.best = {saved.best!r}; "
                    "name the one that the run was trained with, or export the newest with --export_only"
                )
            restored = checkpoints.restore(found[0], program.abstract)
            logger.info("exporting step %d, with the best %s: %.4f", restored.step, saved.best, found[1])
        else:
            newest = checkpoints.restore_newest(program.abstract)
            if newest is None:
                raise _no_checkpoint(workdir)
            restored = newest
            logger.info("exporting step %d", restored.step)
        watch = FiniteWatch(config, workdir, mesh, start=restored.step, newest_checkpoint=checkpoints.newest_complete)
        watch.parameters(restored.step, restored.state.params, "exported")
        tokenizer = distributed.together(lambda: inputs.tokenizer_directory(config, workdir))
        export_state(workdir, program.tree, restored.state, tokenizer, owner=run, config=config, best=best)
