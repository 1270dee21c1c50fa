"""Where the numbers of a run go: one JSON line for each step, TensorBoard, and a progress bar on terminals."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from vr_jax.errors import UserError
from vr_jax.failures import close_after
from vr_jax.storage import AppendedFile, write_text

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"

if TYPE_CHECKING:
    from vr_jax.training.tensorboard import EventFile

logger = logging.getLogger("vr_jax.training")


class MetricsWriter:
    """Appends the records of the steps to `metrics.jsonl` and to TensorBoard's event files."""

    def __init__(self, workdir: Path, *, resume_step: int, tensorboard: bool = True, active: bool = True):
        """Opens the files of a run.

        Records of later steps than `resume_step`, which a killed run wrote after its last checkpoint, are dropped, so
        that the file always reads as one uninterrupted series.

        Args:
            workdir: Folder of the run.
            resume_step: The last step of the checkpoint that the run continues from; 0 for a new run.
            tensorboard: Whether event files are written.
            active: Whether this process writes. Of several processes only the first one does.
        """
        self._file: AppendedFile | None = None
        self._board: EventFile | None = None
        if not active:
            return
        path = workdir / METRICS_FILE
        _truncate(path, resume_step)
        self._file = AppendedFile(path)
        if tensorboard:
            # tensorboardX imports torch where that is installed, which takes seconds.
            from vr_jax.training.tensorboard import EventFile

            self._board = EventFile(workdir / TENSORBOARD_FOLDER, resume_step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends the record of a step.

        Args:
            step: The number of the step.
            values: Its numbers by name. One that is None, because this hardware does not tell it, is left out.
        """
        if self._file is None:
            return
        record = {"step": step, **{k: v for k, v in values.items() if v is not None}}
        self._file.append((json.dumps(record) + "\n").encode())
        if self._board is not None:
            self._board.write(step, {f"train/{name}": value for name, value in record.items() if name != "step"})

    def close(self) -> None:
        """Closes the files."""
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it."""
        close_after(error, self.close)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file, without a last line that a kill cut short.

    Raises:
        UserError: A line is no record; the message names it.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:  # of JSON and of UTF-8
                raise UserError(f"{path}, line {number}: not valid JSON ({error}); move the file away") from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(f"{path}, line {number}: expected an object with the field 'step'; move the file away")
            yield record


def _truncate(path: Path, last_step: int) -> None:
    """Drops the records of steps after `last_step`."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


class Progress:
    """Shows loss, speed and remaining time: a progress bar on a terminal, elsewhere a log line now and then."""

    def __init__(self, *, start: int, total: int, active: bool = True, interval: float = 30.0):
        """Shows the bar where standard error is a terminal.

        Args:
            start: Number of steps done.
            total: Number of steps of the run.
            active: Whether this process shows anything.
            interval: Seconds between two log lines.
        """
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not (active and terminal), dynamic_ncols=True)
        self._logs = active and not terminal
        self._total, self._interval, self._logged = total, interval, time.monotonic()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows that one more step is done, with its loss and speed."""
        text = f"loss {values['loss']:.4f}, {values['samples_per_s']:.1f} samples/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._logs and (now - self._logged >= self._interval or step == self._total):
            logger.info("step %d of %d: %s", step, self._total, text)
            self._logged = now

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()
