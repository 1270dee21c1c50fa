"""The sequence of samples of a run: which sample of which stream stands at a position, whoever reads it.

A stream is a source without end: its samples in the order of one epoch after another, each shuffled anew. Sources that
are mixed by weights or shares are a stream each, and the others are one stream together. The sequence is a function of
the seed and the position alone, so that a position means the same on every process and after every restart.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from vr_jax.data.shuffle import BlockShuffle
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Skip

# The number of positions whose streams are drawn in random order. Within so many positions each stream has its rate.
WINDOW = 1024

Place = tuple[int, int]  # a stream, and the index of a sample in it


@dataclass(frozen=True)
class Mixture:
    """The order in which the samples of several streams come.

    In an epoch of T samples, of which n are of a stream, the streams alternate evenly: any first t samples hold about
    t n / T samples of it. The positions of each window are then shuffled, unless the samples keep their order.

    Attributes:
        counts: The number of samples of each stream in an epoch.
        first: The index of the sample of each stream that comes first.
        seed: The seed of the shuffling.
        shuffle: Whether the positions of a window are shuffled.
    """

    counts: tuple[int, ...]
    first: tuple[int, ...]
    seed: int
    shuffle: bool

    @property
    def epoch(self) -> int:
        """The number of samples of an epoch."""
        return sum(self.counts)

    def place(self, position: int) -> Place:
        """Returns the stream and the index in it of the sample at a position, from 0 without end."""
        if len(self.counts) == 1:
            return 0, self.first[0] + position
        epoch, t = divmod(position, self.epoch)
        if self.shuffle:
            begin = t // WINDOW * WINDOW
            size = min(WINDOW, self.epoch - begin)
            t = begin + int(_order(self.seed, epoch, begin, size)[t - begin])
        stream, before = self._alternate(t)
        return stream, self.first[stream] + epoch * self.counts[stream] + before

    def _alternate(self, t: int) -> Place:
        """Returns the stream at a position of an epoch before the shuffling, and the number of its samples before."""
        total = self.epoch
        for stream, count in enumerate(self.counts):
            before = t * count // total
            if (t + 1) * count // total > before:
                return stream, before
            t, total = t - before, total - count
        raise AssertionError("an epoch has no samples")

    def window_end(self, position: int) -> int:
        """Returns the first position from `position` on that no sample before it was shuffled across."""
        if len(self.counts) == 1 or not self.shuffle:
            return position
        epoch, t = divmod(position, self.epoch)
        return epoch * self.epoch + min(-(-t // WINDOW) * WINDOW, self.epoch)

    def behind(self, position: int) -> tuple[int, ...]:
        """Returns for each stream the index of its first sample that comes at or behind the end of a window."""
        if len(self.counts) == 1:
            return (self.first[0] + position,)
        epoch, t = divmod(position, self.epoch)
        total, found = self.epoch, []
        for first, count in zip(self.first, self.counts, strict=True):
            before = t * count // total if total else 0
            found.append(first + epoch * count + before)
            t, total = t - before, total - count
        return tuple(found)


@functools.lru_cache(maxsize=64)
def _order(seed: int, epoch: int, begin: int, size: int) -> Int[np.ndarray, " size"]:
    return np.random.default_rng((seed, epoch, begin)).permutation(size)


@dataclass(frozen=True)
class OwnPlaces:
    """The places of the samples that one process reads, in order.

    Attributes:
        mixture: The sequence that the processes share.
        left: Places that an earlier number of processes left over, which come first.
        base: The position from which the processes take turns.
        process_index: The index of this process.
        process_count: The number of processes.
        end: The number of samples of the sequence; None if it has no end.
    """

    mixture: Mixture
    left: tuple[Place, ...]
    base: int
    process_index: int
    process_count: int
    end: int | None

    def __len__(self) -> int:
        """Returns the number of places; that of a sequence without end is the largest that Python has for one."""
        if self.end is None:
            return sys.maxsize
        return len(self.left) + len(range(self.base + self.process_index, self.end, self.process_count))

    def position(self, turn: int) -> int:
        """Returns the position that this process takes at its turn, counted from 0."""
        return self.base + self.process_index + turn * self.process_count

    def place(self, index: int) -> Place:
        """Returns the place of the sample that this process reads at an index, from 0."""
        if index < len(self.left):
            return self.left[index]
        return self.mixture.place(self.position(index - len(self.left)))


class PlacedSamples(grain.MapDataset[Any]):
    """The samples of one process, in order."""

    def __init__(self, streams: Sequence[grain.MapDataset], own: OwnPlaces):
        """Reads from the streams where `own` says."""
        super().__init__(streams)
        self._own = own

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._own)

    def __getitem__(self, index: Any) -> Any:
        """Returns the sample at an index; a slice gives a sliced dataset."""
        if isinstance(index, slice):
            return self.slice(index)
        stream, inner = self._own.place(index)
        return self._parents[stream][inner]

    def __str__(self) -> str:
        """Describes the samples for Grain's messages."""
        return f"PlacedSamples({len(self._own.mixture.counts)} streams)"


def streams_of(source: Source, seed: int, *, shuffle: bool) -> list[grain.MapDataset[Conversation | Skip]]:
    """Returns the streams of a source: one for each part of a mixture, otherwise a single one.

    Args:
        source: The samples. One with `counts` is a mixture of its `sources`.
        seed: The seed of the shuffling, in 0..2**32-1.
        shuffle: Whether the samples of an epoch are shuffled.
    """
    if getattr(source, "counts", None) is None:
        return [_stream(source, seed, shuffle)]
    # Each part has an order of its own. `Part` keeps the number of the part, which the statistics of training need.
    return [
        _stream(source.part(number), int(np.random.SeedSequence((seed, number)).generate_state(1)[0]), shuffle)  # type: ignore[attr-defined]
        for number in range(len(source.sources))  # type: ignore[attr-defined]
    ]


def _stream(source: Source, seed: int, shuffle: bool) -> grain.MapDataset[Conversation | Skip]:
    samples: grain.MapDataset = grain.MapDataset.source(source)
    blocks = getattr(source, "blocks", None)
    if not shuffle:
        return samples
    return samples.shuffle(seed=seed) if blocks is None else BlockShuffle(samples, blocks=blocks, seed=seed)


def mixture_of(source: Source, seed: int, *, shuffle: bool) -> Mixture:
    """Returns the order of the streams of a source, from their beginning."""
    counts = getattr(source, "counts", None)
    counts = (len(source),) if counts is None else tuple(counts)
    return Mixture(counts, (0,) * len(counts), seed, shuffle)


def samples_of_epoch(source: Source) -> int:
    """Returns the number of samples of an epoch, which is that of the records unless weights or shares are set."""
    return mixture_of(source, 0, shuffle=False).epoch


def counts_of_shares(lengths: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """Returns the number of samples of each source in an epoch, of which every source gives a share of its own.

    Args:
        lengths: The number of records of each source.
        shares: The share of each; 2.0 reads each record twice. The product is rounded to the nearest integer.
    """
    return tuple(math.floor(share * length + 0.5) for length, share in zip(lengths, shares, strict=True))


def counts_of_weights(lengths: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the number of samples of each source in an epoch, which are in the ratio of the weights.

    An epoch has as many samples as all sources have records. What rounding leaves goes to the largest remainders.

    Args:
        lengths: The number of records of each source.
        weights: The relative rate of each source.
    """
    total = sum(lengths)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(one) for one in exact]
    order = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return tuple(counts)
