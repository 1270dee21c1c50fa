"""Event files of TensorBoard, which show the numbers of a run as curves, and its images and tables beside them."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar, text

from vr_jax.storage import Path, UploadedFolder, file_errors
from vr_jax.training.trackers.protocol import TENSORBOARD_FOLDER, CaptionedImage, Cell, TrackedRun, Tracker, tag_of

_FLUSH_SECONDS = 30.0  # TensorBoard shows numbers that late at most


class TensorBoardTracker(Tracker):
    """Writes a file of TensorBoard's events for each start of the run. It has no place for pages of HTML.

    tensorboardX's own SummaryWriter writes in a thread. If the disk is full, the thread ends, and the training waits
    for it forever; so the events are written here, by the caller.
    """

    name = "tensorboard"

    def start(self, run: TrackedRun) -> None:
        """Opens a new file; TensorBoard drops what earlier files say of steps that are computed again.

        Raises:
            UserError: The file cannot be written.
        """
        self._folder: Path = run.workdir / TENSORBOARD_FOLDER
        self._flushed = time.monotonic()
        self._files = UploadedFolder(self._folder)
        with self._errors():
            self._writer = EventsWriter(str(self._files.local / "events"))
            if run.resume_step or run.written_step:
                self._event(run.resume_step + 1, file_version="brain.Event:2")
                self._event(run.resume_step + 1, session_log=SessionLog(status=SessionLog.START))
                self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step.

        Raises:
            UserError: The file cannot be written.
        """
        with self._errors():
            for name, value in values.items():
                self._event(step, summary=scalar(tag_of(name), value))
            self._flush_now_and_then()

    def images(self, step: int, tag: str, captioned: Sequence[CaptionedImage]) -> None:
        """Adds images as `tag/0`, `tag/1`, ..., and their captions as texts with the same tags.

        Raises:
            UserError: The file cannot be written.
        """
        with self._errors():
            for number, one in enumerate(captioned):
                self._event(step, summary=_image(f"{tag}/{number}", one.png))
                if one.caption:
                    self._event(step, summary=text(f"{tag}/{number}", _preformatted(one.caption)))
            self._flush_now_and_then()

    def table(self, step: int, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Adds a table as a text in Markdown.

        Raises:
            UserError: The file cannot be written.
        """
        lines = [columns, ["---"] * len(columns), *rows]
        markdown = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
        with self._errors():
            self._event(step, summary=text(tag, markdown))
            self._flush_now_and_then()

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left and closes the file."""
        del failed
        with self._errors(), self._files:
            self._writer.close()
            self._files.upload()

    def _flush_now_and_then(self) -> None:
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._writer.flush()
            self._files.upload()

    def _event(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _errors(self) -> AbstractContextManager[None]:
        return file_errors(f"{self._folder} cannot be written")


def _image(tag: str, png: bytes) -> Summary:
    """An image's summary. Width and height are the two numbers that follow a PNG file's signature and first marker."""
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _preformatted(caption: str) -> str:
    """A caption as Markdown that shows it as it is: four spaces make a line a piece of code."""
    return "\n".join(f"    {line}" for line in caption.splitlines())


def _cell(value: Cell) -> str:
    """A cell of a table in Markdown, which ends at a line break or a bar."""
    shown = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(shown.split()).replace("|", "\\|")
