"""Checkpoints of a run: everything that an exact continuation needs, written by Orbax in the background.

    <workdir>/checkpoints/<step>/state/         TrainState: parameters, frozen parameters, moments, step, key
                                /run/           JSON: config, data iterator of every process, skip statistics of skipped samples
                                /checksums.*.json   size and CRC-32 of every file, written once the rest is complete
    <workdir>/checkpoints_damaged/<step>        what failed its checksums, set aside

A step's directory counts only once Orbax has committed it, so a kill at any moment leaves the ones before it intact.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from vr_jax.distributed import barrier, gather
from vr_jax.errors import UserError
from vr_jax.training.state import TrainState

FOLDER, DAMAGED_FOLDER = "checkpoints", "checkpoints_damaged"
CHECKSUMS = "checksums.process_{}.json"
_BLOCK = 1 << 24

logger = logging.getLogger("vr_jax.training")


@dataclass(frozen=True)
class Restored:
    """What a run continues from. `data` is the iterator state of this process."""

    step: int
    state: TrainState
    data: Any
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; every process of a multi-host run makes the same calls.

    keep_last: how many of the newest to keep. keep_best: how many of those with the lowest `loss` to keep besides."""

    def __init__(self, workdir: Path, *, keep_last: int = 3, keep_best: int = 1):
        self.directory = (workdir / FOLDER).absolute()
        self._damaged = (workdir / DAMAGED_FOLDER).absolute()

        def loss(metrics: Mapping[str, float]) -> float:
            return metrics["loss"]

        policies = [preserve.LatestN(keep_last), preserve.BestN(get_metric_fn=loss, reverse=True, n=keep_best)]
        self._options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = self._open()
        self._unsealed: int | None = None
        self._sealing: Future | None = None
        self._sealer = ThreadPoolExecutor(1, "checksums")

    def _open(self) -> ocp.CheckpointManager:
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=self._options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, *, data: Any, run: Mapping[str, Any], loss: float) -> None:
        """Copies the state to the host and writes it in the background; waits for the save before it, if any.

        data: this process's iterator state, JSON-safe. run: JSON-safe. loss: what `keep_best` compares."""
        self.wait()
        described = {**run, "data": gather(data), "process_count": jax.process_count()}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(described))
        self._manager.save(step, args=items, metrics={"loss": loss}, force=True)
        self._unsealed = step

    def poll(self) -> None:
        """Writes the checksums of a save that has been committed; cheap, to be called every step."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._manager.check_for_errors()
            self._sealing = self._sealer.submit(_seal, self.directory / str(self._unsealed))
            self._unsealed = None

    def wait(self) -> None:
        """Returns when the last save is complete, checksums included. Raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self.poll()
        if self._sealing is not None:
            self._sealing.result()
            self._sealing = None

    def close(self) -> None:
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        return self._manager.best_step()

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """The newest undamaged checkpoint in the shapes, types and shardings of `abstract`; None if there is none yet.

        A damaged one is reported with the file at fault and set aside. Raises UserError if all are damaged, or
        if one does not fit `abstract` or this number of processes."""
        steps = self.steps()
        for step in reversed(steps):
            folder = self.directory / str(step)
            problem = next((found for found in gather(verify(folder)) if found is not None), None)
            if problem is None:
                try:
                    return self._restore(step, abstract)
                except Exception as error:  # Orbax raises plain Exceptions for arrays that it cannot read
                    if isinstance(error, UserError) or _sealed(folder):
                        raise
                    problem = f"{folder}: {str(error).splitlines()[0]}"
            aside = self._damaged / str(step)
            logger.error("checkpoint %d is damaged: %s; it is set aside as %s", step, problem, aside)
            self._set_aside(step, aside)
        if steps:
            raise UserError(f"all checkpoints in {self.directory} were damaged; see {self._damaged}")
        return None

    def _set_aside(self, step: int, aside: Path) -> None:
        self._manager.close()
        barrier("checkpoint closed")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        barrier("checkpoint set aside")
        self._manager = self._open()

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["process_count"] != jax.process_count():
            raise UserError(
                f"checkpoint {self.directory / str(step)} was written by {run['process_count']} processes, each with "
                f"its own place in the data; found {jax.process_count()}. Continue with {run['process_count']}, or "
                "start a new run from its exported model"
            )
        folder = self.directory / str(step) / "state"
        _check_fits(self._manager.item_metadata(step)["state"], abstract, folder)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return Restored(step, restored["state"], run["data"][jax.process_index()], run)


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None. Each process checks the files it wrote.

    Nothing is known of a checkpoint without checksums (the run was killed right after the commit)."""
    path = directory / CHECKSUMS.format(jax.process_index())
    if not _sealed(directory):
        logger.warning("checkpoint %s has no checksums: the run ended right after it was written", directory)
        return None
    try:
        expected = json.loads(path.read_text())
    except ValueError as error:
        return f"{path}: not valid JSON ({error})"
    for name, (size, crc) in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes, expected {size}"
        if _crc32(file) != crc:
            return f"{file}: CRC-32 differs from the one recorded when it was written"
    return None


def _sealed(directory: Path) -> bool:
    return (directory / CHECKSUMS.format(jax.process_index())).exists()


def _seal(directory: Path) -> None:
    """Records size and CRC-32 of the files this process wrote; the first process also those of no process."""
    files = {str(f.relative_to(directory)): [f.stat().st_size, _crc32(f)] for f in _own_files(directory)}
    target = directory / CHECKSUMS.format(jax.process_index())
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(files, indent=1))
    temporary.rename(target)


def _own_files(directory: Path) -> Iterator[Path]:
    mine = jax.process_index()
    for file in sorted(directory.rglob("*")):
        if not file.is_file() or file.name.startswith("checksums."):
            continue
        owners = [part.rsplit("_", 1)[1] for part in file.relative_to(directory).parts if "process_" in part]
        if (int(owners[0]) if owners else 0) == mine:
            yield file


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _check_fits(metadata: Any, abstract: TrainState, folder: Path) -> None:
    """Compares what is stored with what is wanted, so that the first differences can be named."""

    def listing(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves}

    stored, wanted = listing(metadata), listing(abstract)
    lines = [f"{name}: found {stored.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}"
             for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]  # fmt: skip
    if lines:
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise UserError(
            f"{folder} belongs to another model, trainable subset or optimizer; use another workdir or the config it "
            "was written with:\n  " + "\n  ".join(lines[:20]) + more
        )


def _name(key_path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in key_path)
