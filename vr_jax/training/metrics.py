"""Where a run's numbers go: one JSON line per step, TensorBoard, and a progress bar on terminals."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tensorboardX import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger("vr_jax.training")


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard event files of a run's directory.

    resume_step: number of the last step of the checkpoint the run continues from (0: a fresh start); what a killed
    run wrote after that step is dropped, so that the file always reads as one uninterrupted series.
    active: False on all processes but the first, which then write nothing."""

    def __init__(self, workdir: Path, *, resume_step: int, tensorboard: bool = True, active: bool = True):
        self._file = self._board = None
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            purge = resume_step + 1 if resume_step else None
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """One record; a value that is None (not known on this hardware) is left out."""
        if self._file is None:
            return
        record = {"step": step, **{k: v for k, v in values.items() if v is not None}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics file; a last line cut short by a kill is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the records up to `last_step`, atomically."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


class Progress:
    """A progress bar with loss, samples/s and time left where standard error is a terminal; elsewhere a log line every
    `interval` seconds."""

    def __init__(self, *, start: int, total: int, active: bool = True, interval: float = 30.0):
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not (active and terminal), dynamic_ncols=True)
        self._logs = active and not terminal
        self._total, self._interval, self._logged = total, interval, time.monotonic()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """One more step is done."""
        text = f"loss {values['loss']:.4f}, {values['samples_per_s']:.1f} samples/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._logs and (now - self._logged >= self._interval or step == self._total):
            logger.info("step %d of %d: %s", step, self._total, text)
            self._logged = now

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
