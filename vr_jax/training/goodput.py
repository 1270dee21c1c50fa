"""Measures what the wall time of a run is spent on, over all its starts.

<workdir>/goodput.json holds the seconds by kind, those at the last checkpoints, and when it was written.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from vr_jax.errors import UserError
from vr_jax.storage import file_errors, parse_json, write_json

GOODPUT_FILE = "goodput.json"
# What the time is spent on, in the order of the line at the end. `steps` is the good part.
KINDS = {
    "steps": "in steps",
    "data": "waiting for data",
    "compiling": "compiling",
    "saving": "saving",
    "restoring": "restoring",
    "validation": "validating",
    "starting": "starting",
    "lost": "lost to failures",
}
_FORMAT, _VERSION = "vr_jax goodput", 1
_KEPT_SAVES = 16  # the checkpoints whose times are remembered; a run continues from one of the newest
_INTERVAL = 30.0  # seconds between two writes, so that so much is not known of the end of a run that is killed

logger = logging.getLogger("vr_jax.training")


class Goodput:
    """Divides the wall time among `KINDS`: at any moment the run spends it on exactly one.

    A run that is killed is seen by the next start: the file does not say that it ended. Everything after the checkpoint
    that the run continues from is then lost, together with the time until the next start. The steps behind that
    checkpoint are computed again; they count as steps the second time, and their number is told.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Reads what earlier starts have spent; the time of this one begins.

        Args:
            workdir: Folder of the run.
            active: Whether this process keeps the file; of several the first one does.
            clock: The seconds since any fixed moment.
            now: The time of day in seconds, which other starts compare with theirs.
        """
        self._path, self._active, self._clock, self._now = workdir / GOODPUT_FILE, active, clock, now
        self._before = _read(self._path) if active else None
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._saves: dict[str, dict[str, float]] = {}
        self._starts, self._redone, self._step = 1, 0, 0
        self._kind, self._since = "starting", clock()
        self._written = clock()
        self._continued = False  # Before it is known what the run continues from, the file stays as it is.

    def continues(self, step: int) -> None:
        """Takes over what earlier starts have spent, where the run continues from their checkpoint of a step.

        Args:
            step: The step of the checkpoint; 0 if the run begins anew.
        """
        self._step, self._continued = step, True
        if self._before is None:
            return
        before = self._before
        earlier, saves = before["seconds"], before["saves"]
        self._starts = before["starts"] + 1
        self._redone = before["redone"] + max(0, before["step"] - step)
        self._saves = {number: spent for number, spent in saves.items() if int(number) <= step}
        kept = earlier
        if not before["ended"]:
            kept = saves.get(str(step), dict.fromkeys(KINDS, 0.0) if step == 0 else earlier)
            lost = sum(earlier.values()) - sum(kept.values()) + max(0.0, self._started() - before["written"])
            kept = {**kept, "lost": kept["lost"] + lost}
        for kind, spent in kept.items():
            self._seconds[kind] += spent

    def _started(self) -> float:
        """The time of day at which this start began."""
        return self._now() - sum(self._seconds.values()) - (self._clock() - self._since)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as one of `KINDS`."""
        before = self._kind
        self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def _turn(self, kind: str) -> None:
        """What follows is spent on another kind."""
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def stepping(self) -> None:
        """The start is over: what is spent on nothing else is spent on steps."""
        self._turn("steps")

    def saved(self, step: int) -> None:
        """Remembers the time at which the state of a step was taken for a checkpoint."""
        self._turn(self._kind)
        self._saves[str(step)] = dict(self._seconds)
        self._saves = dict(list(self._saves.items())[-_KEPT_SAVES:])
        self._write()

    def stepped(self, step: int) -> None:
        """Notes that a step was dispatched; now and then the file is written."""
        self._step = step
        if self._clock() - self._written >= _INTERVAL:
            self._turn(self._kind)
            self._write()

    def _write(self, *, ended: bool = False) -> None:
        self._written = self._clock()
        if not self._active:
            return
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "seconds": self._seconds,
            "starts": self._starts,
            "redone": self._redone,
            "step": self._step,
            "saves": self._saves,
            "written": self._now(),
            "ended": ended,
        }
        write_json(self._path, content)

    def line(self) -> str:
        """Returns the shares of the time in one sentence."""
        total = sum(self._seconds.values())
        shares = [
            f"{spent / total:.1%} {KINDS[kind]}" for kind, spent in self._seconds.items() if spent >= 0.0005 * total
        ]
        starts = f" over {self._starts} starts" if self._starts > 1 else ""
        again = f"; steps computed twice: {self._redone}" if self._redone else ""
        return f"time of the run: {total:,.1f} s{starts}, {', '.join(shares)}{again}"

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tells the shares and writes them for the last time."""
        self._turn(self._kind)
        if not self._active or not self._continued:
            return
        logger.info("%s", self.line())
        # An end by an error may have lost steps, which the next start finds out.
        with contextlib.suppress(*(() if error is None else (UserError, OSError))):
            self._write(ended=error is None or bool(getattr(error, "saved", False)))


def _read(path: Path) -> dict[str, Any] | None:
    """Returns what the file holds, or None if it is absent or of no use; a run does not end because of it."""
    with file_errors(f"{path} cannot be read"):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        content = parse_json(data)
        found = _is_whole(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        found = False
    if not found:
        logger.warning("%s is not readable; the time of earlier starts is not counted", path)
        return None
    return dict(content)


def _is_whole(content: Any) -> bool:
    """Returns whether content is of this format, with all that is computed with; something else may raise an error."""
    times = [content["seconds"], *content["saves"].values()]
    numbers = [content[name] for name in ("starts", "redone", "step", "written")]
    numbers += [spent for time in times for spent in time.values()]
    return (
        (content["format"], content["version"]) == (_FORMAT, _VERSION)
        and all(set(time) == set(KINDS) for time in times)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and all(int(step) >= 0 for step in content["saves"])
        and isinstance(content["ended"], bool)
    )
