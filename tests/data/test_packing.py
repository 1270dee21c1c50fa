"""Rows are filled within their limits, as full as any choice makes them, and resumption changes nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vr_jax.data.packing import CANDIDATES, IndexedExample, RowPacker, fill_row
from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape

SHAPE = BatchShape(rows=3, tokens=100, tiles=10, tile_size=2)


def example(index: int, tokens: int, tiles: int) -> Example:
    nothing = np.zeros(tokens, bool)
    return Example(
        id=str(index),
        tokens=np.zeros(tokens, np.int32),
        loss_mask=nothing,
        text_token_mask=nothing,
        vision_cell=np.full(tokens, -1, np.int32),
        tile_pixels=np.zeros((tiles, 2, 2, 3), np.uint8),
        tile_image=np.ones(tiles, np.int32),
        cells_per_tile=4,
    )


def batches(sizes, packer, resume_after=None):
    """Returns the example numbers of each row of each batch.

    After `resume_after` batches, a new packer that is offered the pending examples continues.
    """
    result = []
    for index, (tokens, tiles) in enumerate(sizes):
        packer.offer(IndexedExample((0, index), example(index, tokens, tiles)))
        while packer.complete:
            result.append([[int(e.id) for e in row] for row in packer.take()])
            if len(result) == resume_after:
                pending = packer.pending()
                packer = RowPacker(packer.shape, packing=packer.packing, lookahead=packer.lookahead)
                for arrival in pending:
                    packer.offer(arrival)
    while packer.pending():
        result.append([[int(e.id) for e in row] for row in packer.take()])
    return result


sizes_of_streams = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), max_size=60)


@settings(deadline=None, max_examples=100)
@given(sizes_of_streams, st.integers(1, 8), st.booleans(), st.integers(1, 5))
def test_every_example_once_within_bounds_and_resumable(sizes, lookahead, packing, resume_after):
    make = lambda: RowPacker(SHAPE, packing=packing, lookahead=lookahead)  # noqa: E731
    found = batches(sizes, make())
    flat = [index for batch in found for row in batch for index in row]
    assert sorted(flat) == list(range(len(sizes)))
    for batch in found:
        assert len(batch) == SHAPE.rows
        for row in batch:
            assert sum(sizes[index][0] for index in row) <= SHAPE.tokens
            assert sum(sizes[index][1] for index in row) <= SHAPE.tiles
            assert row == sorted(row)
            assert packing or len(row) <= 1
    assert batches(sizes, make(), resume_after) == found


@settings(deadline=None, max_examples=100)
@given(sizes_of_streams, st.integers(1, 8))
def test_nothing_waits_for_ever(sizes, lookahead):
    """The oldest waiting example is always in the next batch."""
    found = batches(sizes, RowPacker(SHAPE, lookahead=lookahead))
    left = set(range(len(sizes)))
    for batch in found:
        taken = {index for row in batch for index in row}
        assert min(left) in taken
        left -= taken


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=9), st.integers(20, 40), st.integers(6, 12))
def test_a_row_is_as_full_as_any_choice_makes_it(sizes, tokens, tiles):
    """The chosen row is compared with every possible subset."""

    def share(subset):
        used = [sum(sizes[k][i] for k in subset) for i in (0, 1)]
        return used[0] * tiles + used[1] * tokens if used[0] <= tokens and used[1] <= tiles else -1

    chosen = fill_row(sizes, tokens, tiles)
    assert chosen == sorted(set(chosen))
    assert chosen[:1] == [0][: len(sizes)]
    others = range(1, len(sizes))
    subsets = [[0, *rest] for count in range(len(sizes)) for rest in itertools.combinations(others, count)] or [[]]
    assert share(chosen) == max(map(share, subsets))


def test_rows_are_filled_one_after_another():
    sizes = [(60, 1), (60, 1), (60, 1), (70, 1), (40, 1), (30, 1), (40, 1), (50, 1)]
    found = batches(sizes, RowPacker(SHAPE, lookahead=2))
    assert found == [[[0, 4], [1, 6], [2, 5]], [[3], [7], []]]


def test_a_batch_is_complete_when_it_could_not_hold_all_but_the_newest():
    packer = RowPacker(SHAPE, lookahead=2)
    for index, size in enumerate([100, 100, 100, 1, 1]):
        packer.offer(IndexedExample((0, index), example(index, size, 0)))
        assert not packer.complete
    packer.offer(IndexedExample((0, 5), example(5, 1, 0)))
    assert packer.complete
    assert [[int(e.id) for e in row] for row in packer.take()] == [[0], [1], [2]]
    assert [arrival.place[1] for arrival in packer.pending()] == [3, 4, 5]


def test_tiles_bound_rows_too():
    found = batches([(1, 6), (1, 6), (1, 4), (1, 4)], RowPacker(SHAPE, lookahead=1))
    assert found == [[[0, 2], [1, 3], []]]


def test_packing_is_dense_in_tokens_and_tiles():
    """Rows of about four samples with LLaVA-like sizes are nearly full.

    On average the samples need 98 % of the tile slots when all token slots are used. benchmarks/input/packing.py
    measures the shapes of the config files.
    """
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 3, 5, 7, 10], 2000, p=[0.05, 0.25, 0.5, 0.12, 0.08])
    text = rng.lognormal(np.log(160), 0.8, len(tiles)).clip(60, 1400).astype(int)
    sizes = list(zip((55 * tiles + text).tolist(), tiles.tolist(), strict=True))
    mean_tokens, mean_tiles = np.mean(sizes, axis=0)
    shape = BatchShape(rows=8, tokens=2048, tiles=round(2048 * mean_tiles / mean_tokens / 0.98), tile_size=2)
    found = batches(sizes, RowPacker(shape, lookahead=32))
    full = [row for batch in found[:-2] for row in batch]
    used = np.sum([sizes[index] for row in full for index in row], axis=0) / len(full)
    assert used[0] / shape.tokens > 0.95
    assert used[1] / shape.tiles > 0.92


def test_a_row_is_chosen_from_the_oldest_examples_only():
    """An example beyond the oldest `CANDIDATES` waits, even if it would fill the row best."""
    packer = RowPacker(BatchShape(rows=1, tokens=100, tiles=1, tile_size=2))
    for index in range(CANDIDATES + 1):
        packer.offer(IndexedExample((0, index), example(index, 10 if index == CANDIDATES else 90, 0)))
    assert [e.id for e in packer.take()[0]] == ["0"]
    assert [e.id for e in packer.take()[0]] == ["1", str(CANDIDATES)]


def test_an_example_that_no_row_can_hold_is_refused():
    packer = RowPacker(SHAPE)
    with pytest.raises(ValueError, match=r"sample 7 has 101 tokens and 1 tiles, but a row has room for 100 and 10"):
        packer.offer(IndexedExample((0, 7), example(7, 101, 1)))
    with pytest.raises(ValueError, match="lookahead = 0"):
        RowPacker(SHAPE, lookahead=0)
