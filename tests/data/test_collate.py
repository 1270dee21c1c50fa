"""Examples are assembled into batches of static shape, and each can be found again in its row."""

import numpy as np
import pytest

from tests.data.samples import chat, interpolating_image_config, png, small_config
from vr_jax.data.collate import collate
from vr_jax.data.processor import Processor
from vr_jax.data.types import Skip
from vr_jax.model.batch import NO_CELL, BatchShape

SHAPE = BatchShape(rows=3, tokens=400, tiles=12, tile_size=32)


@pytest.fixture(scope="module")
def examples(tokenizer):
    processor = Processor(tokenizer, small_config())
    return [
        processor.example(chat("<image>\nWhat?", "A", images=(png(70, 30),), name="one")),
        processor.example(chat("Hi", "Hello", name="text")),
        processor.example(chat("<image><image>", "B", images=(png(), png(seed=1)), name="two")),
    ]


def test_each_example_is_found_again_in_its_row(examples):
    """Cutting a row into its segments, and counting cells from the segment's first tile, restores each example."""
    rows = [[examples[1], examples[0], examples[2]], [examples[2]]]
    host = collate(rows, SHAPE)
    batch = host.batch
    assert host.record_ids == (("text", "one", "two"), ("two",), ())
    for r, row in enumerate(rows):
        for segment, example in enumerate(row, start=1):
            here = batch.segment_ids[r] == segment
            np.testing.assert_array_equal(batch.positions[r, here], np.arange(len(example.tokens)))
            for name in ("tokens", "loss_mask", "text_token_mask"):
                np.testing.assert_array_equal(getattr(batch, name)[r, here], getattr(example, name))
            tiles = np.flatnonzero(batch.tile_segment[r] == segment)
            cell = batch.vision_cell[r, here]
            first = tiles[0] if len(tiles) else 0
            np.testing.assert_array_equal(np.where(cell >= 0, cell - 4 * first, cell), example.vision_cell)
            np.testing.assert_array_equal(batch.tile_pixels[r, tiles], example.tile_pixels)
    np.testing.assert_array_equal(batch.tile_image[0, :6], [1, 1, 1, 1, 2, 3][: len(batch.tile_image[0, :6])])
    assert batch.tile_image[0].max() == 3, "images are numbered within the row, not within the sample"


def test_unused_slots_are_padding(examples):
    batch = collate([[examples[0]]], SHAPE).batch
    n, t = len(examples[0].tokens), len(examples[0].tile_pixels)
    assert not batch.segment_ids[0, n:].any()
    assert not batch.segment_ids[1:].any()
    assert not batch.loss_mask[:, n:].any()
    assert np.all(batch.vision_cell[0, n:] == NO_CELL)
    assert np.all(batch.vision_cell[1:] == NO_CELL)
    assert not batch.tile_segment[0, t:].any()
    assert not batch.tile_pixels[0, t:].any()
    assert batch.vision_cells is None
    assert batch.tokens.shape == (3, 400)
    assert batch.tile_pixels.shape == (3, 12, 32, 32, 3)
    assert batch.tile_pixels.dtype == np.uint8
    for name in ("tokens", "positions", "segment_ids", "vision_cell", "tile_segment", "tile_image"):
        assert getattr(batch, name).dtype == np.int32, name


def test_left_padding_right_aligns(examples):
    batch = collate([[examples[0]], [examples[2]]], SHAPE, pad_side="left").batch
    for row, example in enumerate((examples[0], examples[2])):
        n = len(example.tokens)
        np.testing.assert_array_equal(batch.tokens[row, -n:], example.tokens)
        np.testing.assert_array_equal(batch.positions[row, -n:], np.arange(n))
        assert not batch.segment_ids[row, :-n].any()
        assert np.all(batch.tile_segment[row, : len(example.tile_pixels)] == 1), "tiles stay on the left"


def test_weighted_cells_move_with_their_tiles(tokenizer, examples):
    processor = Processor(tokenizer, small_config(image=interpolating_image_config(), text_pool=None))
    shape = BatchShape(rows=1, tokens=400, tiles=24, tile_size=32)
    example = processor.example(chat("<image>", "A", images=(png(90, 90),)))
    batch = collate([[example, example]], shape).batch
    n, t = len(example.tokens), len(example.tile_pixels)
    real = example.vision_cell >= 0
    np.testing.assert_array_equal(batch.vision_cells[0, :n], example.vision_cells)
    np.testing.assert_array_equal(batch.vision_cells[0, n : 2 * n][real], example.vision_cells[real] + 4 * t)
    np.testing.assert_array_equal(batch.vision_weights[0, n : 2 * n], example.vision_weights)
    np.testing.assert_array_equal(batch.vision_cell[0, n : 2 * n][real], batch.vision_cells[0, n : 2 * n, 0][real])
    # In such a batch the tokens of an example without weights have weight one for their own cell.
    plain = collate([[examples[1], examples[0]]], SHAPE, optional=("vision_cells", "vision_weights")).batch
    vision = plain.vision_cell >= 0
    np.testing.assert_array_equal(plain.vision_cells[vision][:, 0], plain.vision_cell[vision])
    np.testing.assert_array_equal(plain.vision_weights, vision[..., None] * [[[1, 0, 0, 0]]])


def test_skips_are_part_of_the_batch(examples):
    skip = Skip("x", "broken_image", "cut off")
    assert collate([[examples[1]]], SHAPE, skipped=[skip]).skipped == (skip,)


@pytest.mark.parametrize(
    ("rows", "shape", "message"),
    [
        (4, SHAPE, "4 rows were given for a batch of 3 rows"),
        (
            1,
            BatchShape(rows=1, tokens=20, tiles=9, tile_size=32),
            r"row 0 \(one\) has \d+ tokens and 4 tiles, but a row of the batch has room for 20 and 9",
        ),
        (1, BatchShape(rows=1, tokens=400, tiles=2, tile_size=32), "4 tiles, but a row .* has room for 400 and 2"),
        (1, BatchShape(rows=1, tokens=400, tiles=9, tile_size=64), "one has tiles of 32 pixels, but .* have 64"),
    ],
)
def test_samples_that_do_not_fit_are_named(examples, rows, shape, message):
    with pytest.raises(ValueError, match=message):
        collate([[examples[0]]] * rows, shape)


def test_pad_side_is_checked(examples):
    with pytest.raises(ValueError, match="pad_side = 'middle'"):
        collate([[examples[0]]], SHAPE, pad_side="middle")
