"""trackio as a tracker (`pip install 'vr-jax[trackio]'`)."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import trackio
from PIL import Image

from vr_jax.settings import TrackioSettings
from vr_jax.training.trackers.protocol import CaptionedImage, Cell, TrackedRun, Tracker, tag_of


class TrackioTracker(Tracker):
    """A run in trackio, on this machine or in a Hugging Face space.

    trackio knows a run by its name, under which each start of the run continues the same one. What a killed run has
    shown after its last checkpoint stays, and is not shown again when it is computed again.
    """

    name = "trackio"

    def __init__(self, settings: TrackioSettings):
        """Opens nothing yet.

        Args:
            settings: How the run stands there.
        """
        self._settings = settings

    def start(self, run: TrackedRun) -> None:
        """Opens the run, or continues it.

        Raises:
            Exception: The folder cannot be written, or the space does not answer.
        """
        own = self._settings
        self._shown = run.written_step
        with contextlib.redirect_stdout(sys.stderr):  # It prints where the run is shown.
            self._run: Any = trackio.init(
                project=own.project,
                name=own.name or f"{run.workdir.name}-{run.identity}",
                group=own.group,
                space_id=own.space,
                config=dict(run.config),
                resume="allow" if run.written_step else "never",
                embed=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        self._log(step, {tag_of(name): value for name, value in values.items()})

    def images(self, step: int, tag: str, captioned: Sequence[CaptionedImage]) -> None:
        """Shows images with their captions, as `tag/0`, `tag/1` and so on."""
        for number, one in enumerate(captioned):
            image = trackio.Image(Image.open(io.BytesIO(one.png)), caption=one.caption)
            self._log(step, {f"{tag}/{number}": image})

    def table(self, step: int, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Shows a table."""
        self._log(step, {tag: trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def page(self, step: int, tag: str, html: str) -> None:
        """Shows a page, as `tag/page`."""
        self._log(step, {f"{tag}/page": trackio.Html(html, inject=False)})

    def close(self, *, failed: bool = False) -> None:
        """Sends what is left."""
        del failed
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._shown or not self._shown:
            self._run.log(values, step=step)
