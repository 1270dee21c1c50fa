"""First-fit packing of examples into the rows of a batch, bounded by token and tile slots (the batch contract)."""

from __future__ import annotations

from dataclasses import dataclass

from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape


@dataclass(frozen=True)
class Arrival:
    """An example with its place in the stream, by which a resumed run finds it again."""

    index: int
    example: Example


class RowPacker:
    """Fills the rows of one batch after another.

    Each arrival goes into the first row with room for its tokens and its tiles; what fits nowhere waits for the next
    batch, oldest first. A batch is complete once `lookahead` examples wait, so that small ones behind a large one may
    still fill gaps. The packer's content is a function of `pending()` alone: offering those again, in that order, to
    an empty packer gives the same packer.

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
        self._rows: list[list[Arrival]] = [[] for _ in range(self.shape.rows)]
        self._tokens = [self.shape.tokens] * self.shape.rows
        self._tiles = [self.shape.tiles] * self.shape.rows
        self._waiting: list[Arrival] = []

    def offer(self, arrival: Arrival) -> None:
        """Takes the next example of the stream."""
        tokens, tiles = len(arrival.example.tokens), len(arrival.example.tile_pixels)
        if tokens > self.shape.tokens or tiles > self.shape.tiles:
            raise ValueError(
                f"sample {arrival.example.id}: {tokens} tokens and {tiles} tiles, a row holds {self.shape.tokens} "
                f"and {self.shape.tiles}"
            )
        for k, row in enumerate(self._rows):
            fits = tokens <= self._tokens[k] and tiles <= self._tiles[k]
            if fits and (self.packing or not row):
                row.append(arrival)
                self._tokens[k] -= tokens
                self._tiles[k] -= tiles
                return
        self._waiting.append(arrival)

    @property
    def complete(self) -> bool:
        """Whether enough examples wait for the next batch to close this one."""
        return len(self._waiting) >= self.lookahead

    def pending(self) -> list[Arrival]:
        """Every example not yet in a taken batch, in the order of the stream."""
        return sorted([a for row in self._rows for a in row] + self._waiting, key=lambda arrival: arrival.index)

    def take(self) -> list[list[Example]]:
        """The rows of the batch as it is now; the waiting examples begin the next one."""
        rows, waiting = self._rows, self._waiting
        self.clear()
        for arrival in waiting:
            self.offer(arrival)
        return [[arrival.example for arrival in row] for row in rows]
