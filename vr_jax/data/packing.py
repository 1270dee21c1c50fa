"""Packing of examples into the rows of a batch. A row has a number of token slots and a number of tile slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape

# A row is filled from this number of the oldest waiting examples. The limit keeps the search fast, and the order of the
# samples close to the shuffled one.
CANDIDATES = 64


@dataclass(frozen=True)
class IndexedExample:
    """An example with its place in the streams of samples, by which a resumed run finds it again.

    Attributes:
        place: The stream, and the index in it (`vr_jax.data.mixture`).
        example: The example.
    """

    place: tuple[int, int]
    example: Example

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of tokens and of tiles."""
        return len(self.example.tokens), len(self.example.tile_pixels)


class RowPacker:
    """Collects examples until they surely fill the rows of a batch, and then fills one row after another.

    Each row begins with the oldest waiting example. The others of the row are those of the oldest `CANDIDATES` examples
    with which it is fullest. All other examples wait for the next batch.

    A batch is complete as soon as it could not hold all examples except the newest `lookahead` ones. The state of the
    packer is a function of `pending()` alone: an empty packer that is offered those examples in that order continues in
    the same way.

    Attributes:
        shape: The sizes of a batch.
        packing: Whether a row may hold several examples.
        lookahead: The number of examples beyond a full batch to choose from.
    """

    def __init__(self, shape: BatchShape, *, packing: bool = True, lookahead: int = 1):
        """Starts with no examples.

        Args:
            shape: The sizes of a batch.
            packing: False puts one example into each row.
            lookahead: The number of examples beyond a full batch to choose from, at least 1.

        Raises:
            ValueError: `lookahead` is below 1.
        """
        if lookahead < 1:
            raise ValueError(f"lookahead = {lookahead}: expected at least 1")
        self.shape = shape
        self.packing = packing
        self.lookahead = lookahead
        self.clear()

    def clear(self) -> None:
        """Forgets all waiting examples."""
        self._pending: list[IndexedExample] = []

    def offer(self, indexed: IndexedExample) -> None:
        """Adds the next example of the sample sequence.

        Raises:
            ValueError: The example does not fit into an empty row.
        """
        tokens, tiles = indexed.size
        if tokens > self.shape.tokens or tiles > self.shape.tiles:
            raise ValueError(
                f"sample {indexed.example.id} has {tokens} tokens and {tiles} tiles, but a row has room for "
                f"{self.shape.tokens} and {self.shape.tiles}"
            )
        self._pending.append(indexed)

    @property
    def complete(self) -> bool:
        """True if a batch could not hold all but the newest `lookahead` examples, so that at least one must wait."""
        sure = self._pending[: -self.lookahead]
        if not self.packing:
            return len(sure) >= self.shape.rows
        tokens = sum(indexed.size[0] for indexed in sure)
        tiles = sum(indexed.size[1] for indexed in sure)
        return tokens > self.shape.rows * self.shape.tokens or tiles > self.shape.rows * self.shape.tiles

    def pending(self) -> list[IndexedExample]:
        """Returns every waiting example in the order of the sample sequence."""
        return list(self._pending)

    def take(self) -> list[list[Example]]:
        """Removes and returns the rows of the next batch. At the end of the sample sequence rows may be empty."""
        rows = []
        for _ in range(self.shape.rows):
            oldest = self._pending[: CANDIDATES if self.packing else 1]
            chosen = fill_row([indexed.size for indexed in oldest], self.shape.tokens, self.shape.tiles)
            rows.append([oldest[k].example for k in chosen])
            for k in reversed(chosen):
                del self._pending[k]
        return rows


def fill_row(sizes: Sequence[tuple[int, int]], tokens: int, tiles: int) -> list[int]:
    """Chooses examples that fill a row best, the first example among them.

    The best choice has the largest sum of the used fraction of token slots and the used fraction of tile slots. Earlier
    examples are preferred among equal choices. The result is exact: dynamic programming visits all sums of sizes, where
    bit n of `reached[t]` states that some of the examples so far have n tokens and t tiles together.

    Args:
        sizes: The numbers of tokens and of tiles of each example.
        tokens: The token slots of the row.
        tiles: The tile slots of the row.

    Returns:
        The ascending indices of the chosen examples. It is empty if there are no examples.
    """
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
