"""Shows on the terminal or in the log how far a run is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Self

from tqdm import tqdm

logger = logging.getLogger("vr_jax.training")


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
        self._validation: dict[str, float] = {}
        self._total, self._interval, self._logged = total, interval, time.monotonic()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows that one more step is done, with its loss and speed and what was measured last on held-out data."""
        self._validation |= {
            name.removeprefix("validation/"): value
            for name, value in values.items()
            if name.startswith("validation/") and value is not None
        }
        text = f"loss {values['loss']:.4f}, {values['samples_per_s']:.1f} samples/s"
        text += "".join(f", {name} {value:.4f}" for name, value in self._validation.items())
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
