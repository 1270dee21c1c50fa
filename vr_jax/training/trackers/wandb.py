"""Weights & Biases as a tracker (`pip install 'vr-jax[wandb]'`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from PIL import Image

from vr_jax.settings import WandbSettings
from vr_jax.storage import UploadedFolder
from vr_jax.training.trackers.protocol import CaptionedImage, Cell, TrackedRun, Tracker, tag_of

# Seconds in which a run that ends may upload what is left. What is not uploaded then stays in `<workdir>/wandb`.
_FINISH_SECONDS = 600.0


class WandbTracker(Tracker):
    """A run in Weights & Biases, which keeps its files in `<workdir>/wandb`.

    The run's id there is the identity of the run in `run.json`, so that each start of the run continues the same one.
    Weights & Biases takes no step back: what a killed run has shown after its last checkpoint stays, and is not shown
    again when it is computed again.
    """

    name = "wandb"

    def __init__(self, settings: WandbSettings):
        """Opens nothing yet.

        Args:
            settings: How the run stands there.
        """
        self._settings = settings

    def start(self, run: TrackedRun) -> None:
        """Opens the run, or continues it.

        Raises:
            Exception: Nobody is logged in, or the service does not answer.
        """
        own = self._settings
        self._shown = run.written_step
        self._files = UploadedFolder(run.workdir)
        self._run: Any = wandb.init(
            project=own.project,
            entity=own.entity,
            id=run.identity,
            name=own.name or run.workdir.name,
            group=own.group,
            tags=own.tags or None,
            mode=own.mode,
            resume="allow" if run.written_step else None,
            dir=str(self._files.local),
            config=dict(run.config),
            settings=wandb.Settings(finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        self._log(step, {tag_of(name): value for name, value in values.items()})

    def images(self, step: int, tag: str, captioned: Sequence[CaptionedImage]) -> None:
        """Shows images with their captions, as `tag/images`."""
        images = [wandb.Image(Image.open(io.BytesIO(one.png)), caption=one.caption) for one in captioned]
        self._log(step, {f"{tag}/images": images})

    def table(self, step: int, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Shows a table."""
        data = [list(row) for row in rows]
        self._log(step, {tag: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def page(self, step: int, tag: str, html: str) -> None:
        """Shows a page, as `tag/page`."""
        self._log(step, {f"{tag}/page": wandb.Html(html, inject=False)})

    def close(self, *, failed: bool = False) -> None:
        """Uploads what is left.

        Args:
            failed: Whether an error ends the run, which then counts as failed there.
        """
        with self._files:
            self._run.finish(exit_code=1 if failed else 0)
            self._files.upload()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._shown or not self._shown:
            self._run.log(values, step=step)
