"""A fixed part of the records of a source, by the sampling strategies of LLaVA's data files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Skip

logger = logging.getLogger("vr_jax.data")


class SelectedSource:
    """Some records of a source, in its order.

    Attributes:
        sources: The source alone, by which its files are found.
    """

    def __init__(self, source: Source, indices: Int[np.ndarray, " n"]):
        """Selects records.

        Args:
            source: The records.
            indices: The ascending indices of the selected ones.
        """
        self.sources = [source]
        self._indices = indices

    def __len__(self) -> int:
        """Returns the number of selected records."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation | Skip:
        """Returns a selected record."""
        return self.sources[0][int(self._indices[index])]

    @property
    def blocks(self) -> list[int] | None:
        """The first index of each group of records that are cheap to read together, or None."""
        blocks: Sequence[int] | None = getattr(self.sources[0], "blocks", None)
        if blocks is None or not len(self):
            return None
        starts = np.unique(np.searchsorted(self._indices, np.asarray(blocks)))
        return [0, *(int(start) for start in starts if 0 < start < len(self))]

    def __repr__(self) -> str:
        """Describes the source and how much of it is selected."""
        return f"SelectedSource({self.sources[0]!r}, {len(self)} of them)"


def selected(source: Source, strategy: str, seed: int) -> Source:
    """Returns the records of a source that a sampling strategy chooses.

    LLaVA rounds a percentage of the records up, and takes all of a file that has fewer records than are asked for
    (`LLaVA-NeXT@df17966:llava/train/train.py`, `LazySupervisedDataset.__init__`). Its random choice is that of Python's
    `random.shuffle` without a seed, which is another one on every process. Here it is drawn from the seed of the run,
    and the chosen records stay in the order of the file.

    Args:
        source: The records.
        strategy: "all", or "first", "end" or "random" with a number of records, e.g. "first:1000", or a percentage,
            e.g. "random:10%" (`vr_jax.settings.SourceSettings`).
        seed: The seed of a random choice.
    """
    if strategy == "all":
        return source
    kind, amount = strategy.split(":")
    number = -(-int(amount[:-1]) * len(source) // 100) if amount.endswith("%") else int(amount)
    if number > len(source):
        logger.warning("%r has fewer records than %s asks for; all of them are taken", source, strategy)
        number = len(source)
    if kind == "random":
        chosen = np.sort(np.random.default_rng((seed, len(source))).permutation(len(source))[:number])
    else:
        begin = 0 if kind == "first" else len(source) - number
        chosen = np.arange(begin, begin + number)
    return SelectedSource(source, chosen)
