"""`metrics.jsonl`: the record of a run, one JSON line for each step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vr_jax.errors import UserError
from vr_jax.storage import AppendedFile, Path, file_errors, write_text
from vr_jax.training.trackers.protocol import TrackedRun, Tracker

METRICS_FILE = "metrics.jsonl"


class JsonlTracker(Tracker):
    """Appends the numbers of each step to `metrics.jsonl`; images, tables and pages are not kept.

    Other parts of the program read the file, so a run ends where it cannot be written.
    """

    name = "jsonl"

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._file: AppendedFile | None = None

    def start(self, run: TrackedRun) -> None:
        """Opens the file.

        Records of later steps than the run continues from, which a killed run wrote after its last checkpoint, are
        dropped, so that the file always reads as one uninterrupted series.

        Raises:
            UserError: The file cannot be read or written.
        """
        path = run.workdir / METRICS_FILE
        _truncate(path, run.resume_step)
        self._file = AppendedFile(path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the record of a step.

        Raises:
            UserError: The file cannot be written.
        """
        assert self._file is not None
        self._file.append((json.dumps({"step": step, **values}) + "\n").encode())

    def flush(self) -> None:
        """Writes the object of a bucket; a file of a disk is always up to date.

        Raises:
            UserError: It cannot be written.
        """
        if self._file is not None:
            self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        del failed
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file, without a last line that a kill cut short.

    Raises:
        UserError: The file cannot be read, or a line is no record; the message names it.
    """
    with file_errors(f"{path} cannot be read"), path.open("rb") as lines:
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


def written_step(workdir: Path) -> int:
    """Returns the last step that a run has recorded, or 0.

    Raises:
        UserError: The file cannot be read, or a line of it is no record.
    """
    path = workdir / METRICS_FILE
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def _truncate(path: Path, last_step: int) -> None:
    """Drops the records of steps after `last_step`."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
