"""All trackers of a run as one: what they are given, and what becomes of one that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from vr_jax.failures import close_after
from vr_jax.storage import Path
from vr_jax.training.trackers.jsonl import JsonlTracker, written_step
from vr_jax.training.trackers.protocol import CaptionedImage, Cell, TrackedRun, Tracker

logger = logging.getLogger("vr_jax.training")


class Trackers:
    """Gives the numbers, images and tables of a run to `metrics.jsonl` and to every other tracker; a context manager.

    A tracker that fails is off from then on, and one line of the log names it: the training goes on. `metrics.jsonl` is
    the record of the run, so a run that cannot write it ends.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        others: Sequence[Tracker] = (),
        config: Mapping[str, Any] | None = None,
        identity: str = "",
        active: bool = True,
    ):
        """Opens the trackers.

        Args:
            workdir: Folder of the run.
            resume_step: The last step of the checkpoint that the run continues from; 0 for a new run.
            others: The trackers besides `metrics.jsonl`.
            config: The settings of the run, which trackers may show; JSON-safe.
            identity: What tells the run apart from all others, the same at each of its starts.
            active: Whether this process writes. Of several processes only the first one does.

        Raises:
            UserError: `metrics.jsonl` cannot be read or written.
        """
        self._record: JsonlTracker | None = None
        self._others: list[Tracker] = []
        if not active:
            return
        run = TrackedRun(
            workdir=workdir,
            resume_step=resume_step,
            written_step=written_step(workdir),
            config=config or {},
            identity=identity,
        )
        self._record = JsonlTracker()
        self._record.start(run)
        self._others = list(others)
        self._all(lambda tracker: tracker.start(run))

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Takes the numbers of a step, once for each step.

        Args:
            step: The number of the step.
            values: Its numbers by name. One that is None, because this hardware does not tell it, is left out.

        Raises:
            UserError: `metrics.jsonl` cannot be written.
        """
        if self._record is None:
            return
        numbers = {name: value for name, value in values.items() if value is not None}
        self._record.scalars(step, numbers)
        self._all(lambda tracker: tracker.scalars(step, numbers))

    def images(self, step: int, tag: str, captioned: Sequence[CaptionedImage]) -> None:
        """Takes images that belong to a step.

        Args:
            step: The number of the step.
            tag: The name of their group, e.g. "first_batch"; slashes make groups of groups.
            captioned: The images with their captions.
        """
        self._all(lambda tracker: tracker.images(step, tag, captioned))

    def table(self, step: int, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Takes a table that belongs to a step.

        Args:
            step: The number of the step.
            tag: Its name.
            columns: The names of its columns.
            rows: Its rows, each with a cell for each column.
        """
        self._all(lambda tracker: tracker.table(step, tag, columns, rows))

    def page(self, step: int, tag: str, html: str) -> None:
        """Takes a page of HTML that belongs to a step.

        Args:
            step: The number of the step.
            tag: Its name.
            html: The whole page, which needs no other file.
        """
        self._all(lambda tracker: tracker.page(step, tag, html))

    def flush(self) -> None:
        """Makes sure that what trackers hold back is written, as is needed before a checkpoint counts.

        Raises:
            UserError: `metrics.jsonl` cannot be written.
        """
        if self._record is not None:
            self._record.flush()
        self._all(lambda tracker: tracker.flush())

    def close(self, *, failed: bool = False) -> None:
        """Closes all trackers.

        Args:
            failed: Whether an error ends the run.
        """
        self._all(lambda tracker: tracker.close(failed=failed))
        if self._record is not None:
            self._record.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it."""
        close_after(error, lambda: self.close(failed=error is not None))

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._others):
            try:
                call(tracker)
            except Exception as error:  # whatever a library and its service may raise
                self._others.remove(tracker)
                _switched_off(tracker.name, error)


def _switched_off(name: str, error: Exception) -> None:
    """Says in one line which tracker is off and why."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    logger.warning("the tracker %s is off from now on, the training goes on: %s", name, reason)
    logger.debug("the tracker %s failed", name, exc_info=error)
