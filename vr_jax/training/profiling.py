"""Traces chosen steps of a run with JAX's profiler."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

import jax

from vr_jax.errors import ConfigError
from vr_jax.settings import ProfileSettings
from vr_jax.storage import Path, UploadedFolder
from vr_jax.training.run_record import PROFILE_FOLDER

logger = logging.getLogger("vr_jax.training")


class Profiler:
    """Traces the steps that are chosen, as far as this start of the run computes them.

    A run that continues within the chosen steps traces the rest of them. A run that ends within them, for whatever
    reason, writes what it has.
    """

    def __init__(self, settings: ProfileSettings, workdir: Path, *, start: int, total: int):
        """Determines the steps.

        Args:
            settings: The chosen steps.
            workdir: Folder of the run.
            start: Number of updates done before this start.
            total: Number of updates of the run.

        Raises:
            ConfigError: The steps lie behind the last one.
        """
        if settings.steps and settings.first_step > total:
            raise ConfigError(
                f"config.profile.first_step = {settings.first_step} lies behind the last update: the run has {total}"
            )
        first = settings.first_step or start + 1
        self._first, self._last = max(first, start + 1), min(first + settings.steps - 1, total)
        self._folder = workdir / PROFILE_FOLDER
        self._since: int | None = None
        self._step = start
        if settings.steps and self._first > self._last:
            logger.info("the steps %d..%d that config.profile chooses are done; none is traced", first, self._last)

    def before(self, step: int) -> None:
        """Starts the trace before its first step."""
        self._step = step
        if step == self._first <= self._last:
            self._files = UploadedFolder(self._folder)
            jax.profiler.start_trace(str(self._files.local))
            self._since = step

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after its last step, once the devices have computed it."""
        if self._since is not None and step == self._last:
            jax.block_until_ready(result)
            self._write()

    def _write(self) -> None:
        since, self._since = self._since, None
        with self._files:
            jax.profiler.stop_trace()
            self._files.upload()
        logger.info("profiler trace of steps %d..%d in %s", since, self._step, self._folder)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes a trace that was not ended, also where an error ends the run."""
        if self._since is not None:
            self._write()
