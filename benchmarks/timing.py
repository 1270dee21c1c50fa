"""Times alternatives side by side: they take turns in one run, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median, the fastest and the slowest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """The times in milliseconds."""
        return f"{self.median * 1e3:8.1f} ms ({self.low * 1e3:.1f} .. {self.high * 1e3:.1f})"


def side_by_side(
    alternatives: dict[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 2
) -> dict[str, Timing]:
    """Times alternatives, which take turns.

    A call ends when its result is there (`jax.block_until_ready`).

    Args:
        alternatives: Functions without arguments, by name.
        rounds: Timed calls of each.
        warmup: Calls of each before these.

    Returns:
        The times of each alternative.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(warmup + rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def report(title: str, timings: dict[str, Timing], base: str) -> str:
    """A small table: each alternative's time and its ratio to `base`."""
    lines = [title]
    for name, timing in timings.items():
        ratio = timing.median / timings[base].median
        lines.append(f"  {name:<28} {timing}   x {ratio:.2f} of {base}")
    return "\n".join(lines)
