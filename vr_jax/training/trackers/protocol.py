"""What a tracker is: something that keeps the numbers, images and tables of a run and shows them to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vr_jax.storage import Path

TENSORBOARD_FOLDER = "tensorboard"
VALIDATION = "validation/"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about the run that it follows.

    Attributes:
        workdir: Folder of the run.
        resume_step: The last step of the checkpoint that this start continues from; 0 for a new run.
        written_step: The last step that earlier starts have recorded. A run that was killed has recorded steps after
            its last checkpoint, which are computed again; a tracker that cannot take steps back leaves them out.
        config: The settings of the run, JSON-safe.
        identity: What tells the run apart from all others, the same at each of its starts.
    """

    workdir: Path
    resume_step: int = 0
    written_step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""


@dataclass(frozen=True)
class CaptionedImage:
    """An image with what is said about it.

    Attributes:
        png: The bytes of a PNG file.
        caption: A text, which may have several lines.
    """

    png: bytes
    caption: str = ""


Cell = str | int | float | None


class Tracker:
    """The interface of a tracker. A subclass implements what it can show; the rest does nothing.

    A method may raise any exception: `Trackers` then says so in one line, and never calls the tracker again.

    Attributes:
        name: The name of the tracker in settings and messages.
    """

    name: str

    def start(self, run: TrackedRun) -> None:
        """Opens what the tracker writes to, and continues the same run where there was one."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a step. It is called once for each step, in their order."""

    def images(self, step: int, tag: str, captioned: Sequence[CaptionedImage]) -> None:
        """Takes images that belong to a step."""

    def table(self, step: int, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Takes a table that belongs to a step."""

    def page(self, step: int, tag: str, html: str) -> None:
        """Takes a page of HTML that belongs to a step."""

    def flush(self) -> None:
        """Writes what it holds, before a checkpoint of the step is written; a killed run continues from there."""

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left.

        Args:
            failed: Whether an error ends the run.
        """


def tag_of(name: str) -> str:
    """Returns the name under which trackers with groups of curves show a number.

    Numbers of training stand under `train/`. Those of validation, whose names begin with `validation/`, have a group of
    their own.
    """
    return name if name.startswith(VALIDATION) else f"train/{name}"
