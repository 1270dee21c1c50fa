"""Shuffling for sources that are read in blocks, such as the row groups of a parquet file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import grain
import numpy as np
from jaxtyping import Int

T = TypeVar("T")


class BlockShuffle(grain.MapDataset[T]):
    """Shuffles the blocks, then the records of every `window` consecutive blocks among themselves; anew each epoch.

    Every record comes once per epoch, and at most `window` blocks are being read at any time.
    blocks: first index of every block, ascending from 0."""

    def __init__(self, parent: grain.MapDataset[T], *, blocks: Sequence[int], seed: int, window: int = 4):
        super().__init__(parent)
        self._bounds = np.append(np.asarray(blocks, np.int64), len(parent))
        self._seed = seed
        self._window = window
        self._order = self._cache()

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(self._order(epoch)[place])]

    def _cache(self):
        return functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Int[np.ndarray, " n"]:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        blocks = rng.permutation(len(self._bounds) - 1)
        parts = []
        for first in range(0, len(blocks), self._window):
            chosen = blocks[first : first + self._window]
            records = np.concatenate([np.arange(self._bounds[b], self._bounds[b + 1]) for b in chosen])
            parts.append(rng.permutation(records))
        return np.concatenate(parts)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._order = self._cache()

    def __str__(self) -> str:
        return f"BlockShuffle({len(self._bounds) - 1} blocks, window {self._window})"
