"""Shuffling of sources that are read in blocks, such as the row groups of a parquet file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain
import numpy as np
from jaxtyping import Int

T = TypeVar("T")


class BlockShuffle(grain.MapDataset[T]):
    """Shuffles the blocks, and then the records of every few consecutive blocks among themselves.

    Each epoch has its own order. Every record comes once per epoch, and at most `window` blocks are in use at any time.
    """

    def __init__(self, parent: grain.MapDataset[T], *, blocks: Sequence[int], seed: int, window: int = 4):
        """Shuffles the records of `parent`.

        Args:
            parent: The records.
            blocks: The index of the first record of every block, ascending from 0.
            seed: The seed of the order.
            window: The number of blocks whose records are mixed.
        """
        super().__init__(parent)
        self._bounds = np.append(np.asarray(blocks, np.int64), len(parent))
        self._seed = seed
        self._window = window
        self._order = self._cache()

    def __len__(self) -> int:
        """Returns the number of records of one epoch."""
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        """Returns the record at a position, which may lie in any epoch; a slice gives a sliced dataset."""
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(self._order(epoch)[place])]

    def _cache(self) -> Callable[[int], Int[np.ndarray, " n"]]:
        return functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Returns the order of the records in an epoch."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        blocks = rng.permutation(len(self._bounds) - 1)
        parts = []
        for first in range(0, len(blocks), self._window):
            chosen = blocks[first : first + self._window]
            records = np.concatenate([np.arange(self._bounds[b], self._bounds[b + 1]) for b in chosen])
            parts.append(rng.permutation(records))
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the cached orders, which are computed again."""
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with no cached order."""
        self.__dict__.update(state)
        self._order = self._cache()

    def __str__(self) -> str:
        """Describes the shuffling for Grain's messages."""
        return f"BlockShuffle({len(self._bounds) - 1} blocks, window {self._window})"
