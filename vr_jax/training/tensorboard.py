"""Event files of TensorBoard, which show the numbers of a run as curves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vr_jax.storage import file_errors, make_folder

_FLUSH_SECONDS = 30.0  # TensorBoard shows numbers that late at most


class EventFile:
    """A file of TensorBoard's events.

    tensorboardX's own SummaryWriter writes in a thread. If the disk is full, the thread ends, and the training waits
    for it forever; so the events are written here, by the caller.
    """

    def __init__(self, folder: Path, resume_step: int):
        """Opens a new file.

        Args:
            folder: Folder of the files of a run.
            resume_step: The last step that counts; TensorBoard drops what earlier files say of later ones. 0 for a new
                run.

        Raises:
            UserError: The file cannot be written.
        """
        self._folder, self._flushed = folder, time.monotonic()
        make_folder(folder)
        with self._errors():
            self._writer = EventsWriter(str(folder / "events"))
            if resume_step:
                self._event(resume_step + 1, file_version="brain.Event:2")
                self._event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
                self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step.

        Raises:
            UserError: The file cannot be written.
        """
        with self._errors():
            for name, value in values.items():
                self._event(step, summary=scalar(name, value))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        with self._errors():
            self._writer.close()

    def _event(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _errors(self) -> AbstractContextManager[None]:
        return file_errors(f"{self._folder} cannot be written")
