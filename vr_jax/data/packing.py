"""Packing of examples into the rows of a batch: a row has so many token and so many tile slots (batch contract)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape

CANDIDATES = 64  # a row is filled from this many of the oldest examples, so that none waits long


@dataclass(frozen=True)
class Arrival:
    """An example with its place in the stream, by which a resumed run finds it again."""

    index: int
    example: Example

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and tiles."""
        return len(self.example.tokens), len(self.example.tile_pixels)


class RowPacker:
    """Collects examples until they surely fill the rows of a batch, then fills one row after another: each begins with
    the oldest example that waits, beside which go those with which it is fullest. The rest waits for the next batch.

    A batch is complete once it could not hold all but the newest `lookahead` examples. The packer is a function
    of `pending()` alone: offering those again, in that order, to an empty packer gives the same one.

    packing: False puts one example into each row. lookahead: at least 1.
    Raises ValueError for an example that no row can hold."""

    def __init__(self, shape: BatchShape, *, packing: bool = True, lookahead: int = 1):
        if lookahead < 1:
            raise ValueError(f"lookahead = {lookahead}: expected at least 1")
        self.shape = shape
        self.packing = packing
        self.lookahead = lookahead
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._pending: list[Arrival] = []

    def offer(self, arrival: Arrival) -> None:
        """Takes the next example of the stream."""
        tokens, tiles = arrival.size
        if tokens > self.shape.tokens or tiles > self.shape.tiles:
            raise ValueError(
                f"sample {arrival.example.id}: {tokens} tokens and {tiles} tiles, a row holds {self.shape.tokens} "
                f"and {self.shape.tiles}"
            )
        self._pending.append(arrival)

    @property
    def complete(self) -> bool:
        """Whether a batch could not hold all but the newest `lookahead` examples; then at least one is left behind."""
        sure = self._pending[: -self.lookahead]
        if not self.packing:
            return len(sure) >= self.shape.rows
        tokens = sum(arrival.size[0] for arrival in sure)
        tiles = sum(arrival.size[1] for arrival in sure)
        return tokens > self.shape.rows * self.shape.tokens or tiles > self.shape.rows * self.shape.tiles

    def pending(self) -> list[Arrival]:
        """Every example not yet in a taken batch, in the order of the stream."""
        return list(self._pending)

    def take(self) -> list[list[Example]]:
        """The rows of the next batch, at the end of the stream perhaps empty ones; the other examples stay."""
        rows = []
        for _ in range(self.shape.rows):
            nearest = self._pending[: CANDIDATES if self.packing else 1]
            chosen = fullest([arrival.size for arrival in nearest], self.shape.tokens, self.shape.tiles)
            rows.append([nearest[k].example for k in chosen])
            for k in reversed(chosen):
                del self._pending[k]
        return rows


def fullest(sizes: Sequence[tuple[int, int]], tokens: int, tiles: int) -> list[int]:
    """Which of the examples of `sizes` (tokens, tiles), the first of them included, fill a row best: the largest sum of
    the shares of its token and its tile slots in use. Earlier examples win over equal ones. Ascending; [] of none.

    Exact, by dynamic programming over all sums that can be reached: bit n of `reached[t]` says that some of the
    examples seen so far have n tokens and t tiles together."""
    if not sizes:
        return []
    first, *others = sizes
    free_tokens, free_tiles = tokens - first[0], tiles - first[1]
    fits = (1 << (free_tokens + 1)) - 1
    reached = [1] + [0] * free_tiles
    before = []
    for more_tokens, more_tiles in others:
        before.append(reached.copy())
        for t in range(free_tiles, more_tiles - 1, -1):
            reached[t] |= reached[t - more_tiles] << more_tokens & fits
    ends = [(bits.bit_length() - 1, t) for t, bits in enumerate(reached) if bits]
    n, t = max(ends, key=lambda end: end[0] * tiles + end[1] * tokens)
    chosen = []
    for k in range(len(others), 0, -1):
        if not before[k - 1][t] >> n & 1:
            chosen.append(k)
            n, t = n - others[k - 1][0], t - others[k - 1][1]
    return [0, *reversed(chosen)]
