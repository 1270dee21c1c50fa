"""Checkpoints of a run: everything that an exact continuation needs, written by Orbax in the background.

    <workdir>/checkpoints/<step>/state/                      the TrainState
                                /run/                        JSON: format version, settings, positions in the data
                                /checksums.process_<n>.json  size and CRC-32 of every file of a process, written last
    <workdir>/checkpoints_damaged/<step>/                    checkpoints that failed their checksums

A checkpoint counts when its checksums are written, so that a run may be killed at any moment. One that cannot be
written ends the run with one line, and nothing of it is left; those before it stay as they are.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from vr_jax import distributed
from vr_jax.array_files import write_small_arrays_whole
from vr_jax.errors import UserError
from vr_jax.failures import close_after, first_error_kept, size_text
from vr_jax.settings import LOSS, CheckpointSettings
from vr_jax.storage import (
    Path,
    as_path,
    check_free,
    file_errors,
    is_local,
    make_folder,
    move_folder,
    refuse_s3,
    remove_empty_folders,
    remove_folder,
)
from vr_jax.training import checksums
from vr_jax.training.state import TrainState

FORMAT, VERSION = "vr_jax checkpoint", 2
FOLDER, DAMAGED_FOLDER = "checkpoints", "checkpoints_damaged"
_SHOWN_DIFFERENCES = 6
_REMOVAL_PAUSES = (0.0, 0.2, 1.0)  # seconds before the attempts to remove an unfinished checkpoint
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # what Orbax calls a folder until it is whole

logger = logging.getLogger("vr_jax.training")


@dataclass(frozen=True)
class Restored:
    """The content of a checkpoint.

    Attributes:
        step: The step after which it was written.
        state: The state of the training.
        data: The states of the iterators of all processes of the run that was saved, in their order.
        config: The settings of the run, as `TrainConfig.to_dict` returns them.
        skip_statistics: The counts of the samples of all processes that could not be used.
        unwritten: The numbers of the step, where they were not written because the run was asked to stop before its
            held-out data were measured.
    """

    step: int
    state: TrainState
    data: list[Any]
    config: dict[str, Any]
    skip_statistics: Any
    unwritten: Mapping[str, float] | None = None


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls.

    Attributes:
        directory: The folder of the checkpoints, with a folder for each step.
    """

    def __init__(self, workdir: Path, *, keep_last: int = 3, keep_best: int = 1, best: str = LOSS):
        """Opens the checkpoints of a run and removes those that a killed process left unfinished.

        Args:
            workdir: Folder of the run.
            keep_last: How many of the newest checkpoints are kept.
            keep_best: How many of the best ones are kept besides.
            best: The number that tells which are best: of losses the lowest, of other numbers the highest.
        """
        whole = as_path(workdir, "workdir").absolute()
        refuse_s3(whole, "workdir")
        self.directory = whole / FOLDER
        self._damaged = whole / DAMAGED_FOLDER
        distributed.together(lambda: make_folder(self.directory))

        lowest = best.rpartition("/")[2] == LOSS

        def number(metrics: Mapping[str, float]) -> float:
            # A checkpoint at which it was not measured, because the run was asked to stop there, is never the best.
            return metrics.get(best, math.inf if lowest else -math.inf)

        self._keep_last, self._keep_best = keep_last, keep_best
        self._number, self._lowest = number, lowest
        # One more, because Orbax removes old checkpoints before the newest one has its checksums.
        policies = [preserve.LatestN(keep_last + 1), preserve.BestN(get_metric_fn=number, reverse=lowest, n=keep_best)]
        self._options = ocp.CheckpointManagerOptions(
            best_fn=number,
            best_mode="min" if lowest else "max",
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._size = 0  # bytes of the last save
        self._manager = self._open()
        self._without_checksums: int | None = None
        self._sealing: Future[None] | None = None
        self._sealer = ThreadPoolExecutor(1, "checksums")

    def _errors(self) -> AbstractContextManager[None]:
        """Names what Orbax and TensorStore fail with in their threads."""
        return file_errors(f"{self.directory} cannot be written", needed=self._size)

    def _open(self) -> ocp.CheckpointManager:
        write_small_arrays_whole()
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        with self._errors():
            return ocp.CheckpointManager(str(self.directory), options=self._options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data: Any,
        config: Mapping[str, Any],
        skip_statistics: Any,
        metrics: Mapping[str, float],
        unwritten: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the state to the host and writes it in the background, after the save before it is complete.

        Args:
            step: Number of updates done.
            state: The state of the training.
            data: The state of the iterator of this process, JSON-safe.
            config: The settings of the run, JSON-safe.
            skip_statistics: The counts of the samples of all processes that could not be used, JSON-safe.
            metrics: The numbers of the step by name, by one of which the best checkpoints are chosen.
            unwritten: The numbers of the step that the next start writes; None if they are written.

        Raises:
            UserError: There is no room for it, or the save before it has failed.
        """
        self.finish()
        self._size = state_bytes(state)

        def check_room() -> None:
            if distributed.is_first():
                check_free(self.directory, self._size, f"{self.directory / str(step)} cannot be written")

        distributed.together(check_room)
        run = {
            "format": FORMAT,
            "version": VERSION,
            "config": dict(config),
            "skip_statistics": skip_statistics,
            "unwritten": None if unwritten is None else dict(unwritten),
            "data": distributed.gather(data),
            "process_count": distributed.process_count(),
        }
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        with self._errors():
            self._manager.save(step, args=items, metrics=dict(metrics), force=True)
        self._without_checksums = step

    def is_saving(self) -> bool:
        """Returns whether a save is being written in the background."""
        return bool(self._manager.is_saving_in_progress())

    def poll(self) -> None:
        """Starts on the checksums of a save that Orbax has finished. It is cheap, and called at every step."""
        if self._without_checksums is not None and not self.is_saving():
            step, self._without_checksums = self._without_checksums, None
            with self._errors():
                self._manager.wait_until_finished()  # It has finished; this raises what it failed with.
            self._sealing = self._sealer.submit(checksums.write_record, self.directory / str(step))

    def wait(self) -> None:
        """Waits until the last save is complete with its checksums.

        Raises:
            UserError: It cannot be written.
        """
        try:
            with self._errors():
                self._manager.wait_until_finished()
        except UserError:
            self._without_checksums = None  # There is no such checkpoint.
            raise
        self.poll()
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            with self._errors():
                sealing.result()

    def finish(self) -> None:
        """Waits until the last save is complete, then removes the checkpoint whose place it takes.

        Raises:
            UserError: It cannot be written.
        """
        self.wait()
        distributed.barrier("the last save is complete")
        # One process decides, since the first removal takes away what the others would look at.
        for step in distributed.gather(self._superseded() if distributed.is_first() else [])[0]:
            with self._errors():
                self._manager.delete(step)

    def _superseded(self) -> list[int]:
        """The steps of the checkpoints that are neither among the newest nor among the best."""
        steps = self.steps()
        old = steps[: max(0, len(steps) - self._keep_last)]
        if not old:
            return []
        numbers = {step: self._number(self._manager.metrics(step)) for step in steps}
        sign = 1 if self._lowest else -1
        best = sorted(steps, key=lambda step: (sign * numbers[step], -step))[: self._keep_best]
        return sorted(set(old) - set(best))

    def close(self) -> None:
        """Waits for the last save and releases the threads.

        Raises:
            UserError: The last save has failed; nothing of it is left.
        """
        with first_error_kept(self._remove_unfinished), first_error_kept(self._release):
            self.wait()

    def _release(self) -> None:
        self._sealer.shutdown()
        with self._errors():
            self._manager.close()

    def _remove_unfinished(self) -> None:
        if distributed.is_first():
            for folder in list(self.directory.glob(_UNFINISHED)):
                for pause in _REMOVAL_PAUSES:  # Threads of TensorStore may still write into it.
                    time.sleep(pause)
                    with suppress(UserError):
                        remove_folder(folder)
                        break

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it. An error of the block stays the one that is raised."""
        close_after(error, self.close)
        if error is not None:
            close_after(error, self._remove_unfinished)
            if distributed.is_first():
                remove_empty_folders(self.directory)  # A run that saved nothing leaves none.

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that Orbax has finished, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint; None if the number was measured at none of them."""
        found = self.best()
        return None if found is None else found[0]

    def best(self) -> tuple[int, float] | None:
        """Returns the step of the best checkpoint and its number; None if the number was measured at none of them."""
        step = self._manager.best_step()
        number = math.inf if step is None else self._number(self._manager.metrics(step) or {})
        return (step, number) if math.isfinite(number) else None

    def newest_complete(self) -> int | None:
        """Returns the step of the newest checkpoint, after the save that is under way; None if there is none."""
        self.wait()
        return max(self.steps(), default=None)

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """Restores the newest checkpoint that is complete and undamaged.

        A damaged checkpoint is reported with the file at fault and set aside. One without checksums, whose run was
        killed before they were written, is set aside too.

        Args:
            abstract: The shapes, types and shardings that the state gets, on whatever mesh.

        Returns:
            The content of the checkpoint, or None if the run has not completed one.

        Raises:
            UserError: All checkpoints are damaged, or the newest one is of another format version or another model.
        """
        damaged = False
        for step in reversed(self.steps()):
            complete, problem = self._look_at(step)
            if problem is None:
                return self._restore(step, abstract)
            damaged |= complete
            aside = self._damaged / str(step)
            logger.error("checkpoint %d %s; it is set aside as %s", step, problem, aside)
            self._set_aside(step, aside)
        if damaged:
            raise UserError(
                f"all checkpoints in {self.directory} were damaged; they are in {self._damaged}. Restore a copy, or "
                "start a new run in another workdir"
            )
        return None

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Restores one checkpoint.

        Args:
            step: The step after which it was written.
            abstract: The shapes, types and shardings that the state gets, on whatever mesh.

        Raises:
            UserError: It is damaged or not complete, or of another format version or another model.
        """
        _, problem = self._look_at(step)
        if problem is not None:
            folder = self.directory / str(step)
            raise UserError(f"checkpoint {folder} cannot be used: it {problem}; restore a copy, or use another one")
        return self._restore(step, abstract)

    def _look_at(self, step: int) -> tuple[bool, str | None]:
        """Whether a checkpoint has its checksums, and what is wrong with it; None where nothing is."""
        records = distributed.together(lambda: _records(self.directory / str(step)))
        if not all(distributed.gather(distributed.together(lambda: all(record.exists() for record in records)))):
            return False, "is not complete: the run ended before its checksums were written"
        damage = distributed.together(lambda: checksums.find_damage(records))
        problems = [found for found in distributed.gather(damage) if found is not None]
        return True, f"is damaged: {problems[0]}" if problems else None

    def _set_aside(self, step: int, aside: Path) -> None:
        self._manager.close()
        distributed.barrier("checkpoints closed")
        distributed.together(lambda: move_folder(self.directory / str(step), aside) if distributed.is_first() else None)
        self._manager = self._open()

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        folder = self.directory / str(step)
        run = distributed.together(lambda: _read_run(folder))
        _check_fits(self._manager.item_metadata(step)["state"], abstract, folder / "state", run["config"])
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return Restored(
            step=step,
            state=restored["state"],
            data=run["data"],
            config=run["config"],
            skip_statistics=run["skip_statistics"],
            unwritten=run.get("unwritten"),
        )


def has_checkpoints(workdir: Path) -> bool:
    """Returns whether a run's folder has the folder of a checkpoint, finished or not."""
    folder = workdir / FOLDER
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def _records(folder: Path) -> list[Path]:
    """Returns the records of checksums that this process looks at, whatever state the checkpoint is in."""
    present = len(list(folder.glob(checksums.FILE_NAME.format("*"))))
    try:
        written_by = int(json.loads(_run_file(folder).read_text())["process_count"])
    except (OSError, ValueError, KeyError, TypeError):  # It is damaged, which its checksums show.
        written_by = max(1, present)
    return checksums.record_files(folder, written_by)


def _run_file(folder: Path) -> Path:
    """The file of Orbax's JsonCheckpointHandler."""
    return folder / "run" / "metadata"


def _read_run(folder: Path) -> dict[str, Any]:
    """Reads what a checkpoint holds beside the state, and makes sure that it has the format of this version."""
    path = _run_file(folder)
    with file_errors(f"{path} cannot be read"):
        run: dict[str, Any] = json.loads(path.read_text())
    _check_version(run, folder)
    return run


def state_bytes(state: TrainState) -> int:
    """Returns the bytes of the arrays of a state, or of its shapes, over all devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_room(workdir: Path, settings: CheckpointSettings, abstract: TrainState, exported: int, saves: int) -> None:
    """Makes sure, before the training, that the disk has room for what a run writes.

    Args:
        workdir: Folder of the run. The checkpoints that it holds count as room, since they are replaced.
        settings: How many checkpoints are kept; one more exists while it is written.
        abstract: Shapes and types of the state.
        exported: Bytes of the model directory at the end.
        saves: Number of checkpoints that the run will write.

    Raises:
        UserError: There is less room; the message has both numbers and the settings to change.
    """
    each, kept = state_bytes(abstract), settings.keep_last + settings.keep_best + 1
    count = min(kept, saves)
    with file_errors(f"{workdir} cannot be read"):
        files = (workdir / FOLDER).rglob("*") if is_local(workdir) else ()  # a bucket has room
        present = sum(file.stat().st_size for file in files if file.is_file())
    check_free(
        workdir,
        max(0, count * each - present) + exported,
        f"{workdir} has no room for {count} checkpoint{'s' if count > 1 else ''} of {size_text(each)} "
        f"(config.checkpoint.keep_last = {settings.keep_last}, keep_best = {settings.keep_best}, and one that is being "
        f"written) and the exported model of {size_text(exported)}",
        "keep fewer checkpoints, free some space, or choose another --workdir",
    )


def _check_version(run: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError for a checkpoint of an older or newer format."""
    version = run.get("version") if run.get("format") == FORMAT else 1
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "update vr_jax" if newer else "continue with the vr_jax that wrote it, or start a new run"
        raise UserError(f"checkpoint {folder} has format version {version}, this vr_jax reads {VERSION}; {advice}")


def _check_fits(metadata: Any, abstract: TrainState, folder: Path, config: Mapping[str, Any]) -> None:
    """Compares the stored shapes with the wanted ones; raises UserError that names the first differences."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves}

    stored, wanted = shapes(metadata), shapes(abstract)
    lines = [
        f"{name}: found {stored.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if lines:
        left = len(lines) - _SHOWN_DIFFERENCES
        more = f"; and {left} more" if left > 0 else ""
        raise UserError(
            f"{folder} belongs to another model, trainable subset or optimizer{_written_with(config)}; use another "
            f"workdir or the config it was written with. Differences: {'; '.join(lines[:_SHOWN_DIFFERENCES])}{more}"
        )


def _written_with(config: Mapping[str, Any]) -> str:
    """The settings of a checkpoint that decide which arrays its optimizer and its adapters have."""
    found = {"config.trainable": config.get("trainable")}
    for section, names in {"optimizer": ("name",), "lora": ("rank", "targets")}.items():
        found |= {f"config.{section}.{name}": config.get(section, {}).get(name) for name in names}
    shown = [f"{name} = {value!r}" for name, value in found.items() if value is not None]
    return f" (it was written with {', '.join(shown)})" if shown else ""


def _name(key_path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in key_path)
