import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vr_jax.data.packing import Arrival, RowPacker
from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape

SHAPE = BatchShape(rows=3, tokens=100, tiles=10, tile_size=2)


def example(index: int, tokens: int, tiles: int) -> Example:
    nothing = np.zeros(tokens, bool)
    return Example(
        id=str(index),
        tokens=np.zeros(tokens, np.int32),
        loss_mask=nothing,
        guide_mask=nothing,
        vision_cell=np.full(tokens, -1, np.int32),
        tile_pixels=np.zeros((tiles, 2, 2, 3), np.uint8),
        tile_image=np.ones(tiles, np.int32),
        cells_per_tile=4,
    )


def batches(sizes, packer, resume_after=None):
    """Rows of example numbers per batch; with `resume_after`, a new packer takes over behind that many batches."""
    result = []
    for index, (tokens, tiles) in enumerate(sizes):
        packer.offer(Arrival(index, example(index, tokens, tiles)))
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
    """The oldest waiting example is in the next batch, so none is overtaken by more than the look-ahead and a batch."""
    found = batches(sizes, RowPacker(SHAPE, lookahead=lookahead))
    left = set(range(len(sizes)))
    for batch in found:
        taken = {index for row in batch for index in row}
        assert min(left) in taken
        left -= taken


def test_first_fit_fills_gaps():
    sizes = [(60, 1), (60, 1), (60, 1), (70, 1), (40, 1), (30, 1), (40, 1)]
    found = batches(sizes, RowPacker(SHAPE, lookahead=2))
    assert found == [[[0, 4], [1, 5], [2, 6]], [[3], [], []]]


def test_tiles_bound_rows_too():
    found = batches([(1, 6), (1, 6), (1, 4), (1, 4)], RowPacker(SHAPE, lookahead=1))
    assert found == [[[0, 2], [1, 3], []]]


def test_packing_is_dense_on_realistic_lengths():
    """LLaVA-like lengths: 17 rows' worth of look-ahead leave less than 6 % of the token slots empty."""
    rng = np.random.default_rng(0)
    sizes = [(int(n), 5) for n in np.clip(rng.normal(420, 160, 4000), 80, 1200)]
    shape = BatchShape(rows=8, tokens=4096, tiles=120, tile_size=2)
    found = batches(sizes, RowPacker(shape, lookahead=32))[:-1]
    used = sum(sizes[index][0] for batch in found for row in batch for index in row)
    assert used / (len(found) * shape.rows * shape.tokens) > 0.94


def test_what_no_row_can_hold():
    packer = RowPacker(SHAPE)
    with pytest.raises(ValueError, match=r"sample 7: 101 tokens and 1 tiles, a row holds 100 and 10"):
        packer.offer(Arrival(7, example(7, 101, 1)))
    with pytest.raises(ValueError, match="lookahead = 0"):
        RowPacker(SHAPE, lookahead=0)
