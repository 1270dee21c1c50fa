"""Finds the process that waits longest for its data, and the source that it waits for."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vr_jax import distributed
from vr_jax.data.types import HostBatch
from vr_jax.settings import TrainConfig

EVERY = 100  # updates between two exchanges, besides those at checkpoints
# The slowest process is named where it waits for so large a share of the time. All others wait for it in each update.
THRESHOLD = 0.05

logger = logging.getLogger("vr_jax.training")


class InputWaits:
    """Adds up how long this process waits for batches, and compares the processes now and then.

    The waits are exchanged at every checkpoint, where the processes meet anyway, and every `EVERY` updates.
    """

    def __init__(
        self, config: TrainConfig, sources: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Starts the clock.

        Args:
            config: The settings of the run.
            sources: The names of the sources, where batches tell them apart (`token_source`).
            clock: The seconds since any fixed moment.
        """
        self._sources = tuple(sources)
        self._whole = config.data.path or config.data.format
        self._clock, self._began = clock, clock()
        self._waits: Counter[str] = Counter()

    def add(self, seconds: float, batch: HostBatch) -> None:
        """Takes the wait for a batch. It counts for the batch's sources by their shares of its tokens."""
        of_tokens = batch.batch.token_source
        if not self._sources or of_tokens is None:
            self._waits[self._whole] += seconds  # type: ignore[assignment]  # Counter is typed for integers
            return
        tokens = np.asarray(of_tokens)
        counts = np.bincount(tokens[tokens >= 0], minlength=len(self._sources))
        for name, count in zip(self._sources, counts / max(1, int(counts.sum())), strict=True):
            self._waits[name] += seconds * float(count)  # type: ignore[assignment]

    def exchange(self, step: int) -> dict[str, float]:
        """Compares the processes and begins anew; all of them call it at the same steps.

        Args:
            step: The number of the last update, for the log.

        Returns:
            Of several processes, `data_wait_max`, the share of the time that the slowest one waited, and
            `data_wait_process`, its number; nothing for a single one, whose `data_wait` says as much.
        """
        elapsed = max(self._clock() - self._began, 1e-9)
        source, longest = max(self._waits.items(), key=lambda item: item[1], default=(self._whole, 0.0))
        own = {
            "waited": sum(self._waits.values()),
            "source": source,
            "part": longest,
            "name": distributed.this_process(),
        }
        found: list[dict[str, Any]] = distributed.gather(own)
        self._began, self._waits = self._clock(), Counter()
        slowest = max(range(len(found)), key=lambda index: found[index]["waited"])
        one = found[slowest]
        share = min(1.0, one["waited"] / elapsed)
        if share >= THRESHOLD and distributed.is_first():
            rest = max((other["waited"] for index, other in enumerate(found) if index != slowest), default=None)
            others = "" if rest is None else f"; no other process waited longer than {rest:.1f} s"
            logger.warning(
                "%s waited %.1f of %.1f s for its data until step %d, %.1f s of them for %s%s",
                *(one["name"], one["waited"], elapsed, step, one["part"], one["source"], others),
            )
        if len(found) == 1:
            return {}
        return {"data_wait_max": share, "data_wait_process": float(slowest)}
