"""Samples whose images are cut into slices, from the conversation to the batch and to the page of the data."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.data import sliced
from tests.golden.discovery import documents
from vr_jax.data.check_page import pieces_of
from vr_jax.data.collate import collate
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.efficiency.systems import image_size
from vr_jax.model.batch import NO_CELL, BatchShape
from vr_jax.model.config import ImageConfig

PROCESSOR = sliced.processor()
ONE = "<image>{4}</image>"
# The text of an image of each size, as MiniCPM-V writes it with four queries for a slice.
SIZES = {
    (60, 60): f"{ONE}\n",
    (140, 70): f"{ONE}<slice>{ONE}{ONE}</slice>\n",
    (70, 140): f"{ONE}<slice>{ONE}\n{ONE}</slice>\n",
    (140, 140): f"{ONE}<slice>{ONE}{ONE}\n{ONE}{ONE}</slice>\n",
}


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked(*sizes: tuple[int, int]) -> Conversation:
    turns = (Turn("user", *[IMAGE] * len(sizes), "Which?"), Turn("assistant", "cat"))
    return Conversation("asked", turns, tuple(png(*size) for size in sizes))


def text_of(example) -> str:
    """The tokens as text, with the number of vision tokens in their place."""
    pieces = [piece.text for piece in pieces_of(example, sliced.tokenizer())]
    return re.sub(r"\[(\d+) vision tokens\]", r"{\1}", "".join(pieces))


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_holds_the_text_of_minicpm_v(size):
    example = PROCESSOR.example(asked(size))
    assert text_of(example) == f"<用户>{SIZES[size]}Which?<AI>cat</s>"
    assert text_of(PROCESSOR.prompt(asked(size))) == f"<用户>{SIZES[size]}Which?<AI>"
    vision = example.vision_cell != NO_CELL
    assert (example.tokens[vision] == sliced.tokenizer().pad_token_id).all()
    assert not (example.loss_mask | example.text_token_mask)[vision].any()
    special = np.isin(example.tokens, list(PROCESSOR.encoder.markers.values()))
    assert not (example.text_token_mask & special).any()
    np.testing.assert_array_equal(example.vision_cell[vision], np.arange(vision.sum()))
    assert example.tile_extent.shape == (len(example.tile_pixels), 2)
    assert example.tile_origin is None
    assert PROCESSOR.size(asked(size)) == (len(example.tokens), len(example.tile_pixels))


def test_several_images_stand_one_behind_another_and_are_all_cut():
    example = PROCESSOR.example(asked((140, 70), (60, 60)))
    assert text_of(example) == f"<用户>{SIZES[140, 70]}{SIZES[60, 60]}Which?<AI>cat</s>"
    assert example.tile_image.tolist() == [1, 1, 1, 2]
    assert example.vision_cell[example.vision_cell != NO_CELL].tolist() == list(range(16))


def test_text_alone_has_no_slices():
    example = PROCESSOR.example(asked())
    assert text_of(example) == "<用户>Which?<AI>cat</s>"
    assert example.tile_extent.shape == (0, 2)


def test_a_batch_has_the_extent_of_every_slot():
    """In one row, cells and images of the second sample follow those of the first; unused slots are zero."""
    first, second = PROCESSOR.example(asked((140, 70))), PROCESSOR.example(asked((60, 60)))
    fields = PROCESSOR.config.batch_fields
    assert fields == {"tile_extent"}
    side = PROCESSOR.config.image.tile_size
    shape = BatchShape(rows=2, tokens=96, tiles=5, tile_size=side)
    batch = collate([[first, second]], shape, optional=fields).batch
    expected = [*first.tile_extent.tolist(), *second.tile_extent.tolist(), [0, 0]]
    assert batch.tile_extent[0].tolist() == expected
    assert not batch.tile_extent[1].any()
    assert batch.tile_image[0].tolist() == [1, 1, 1, 2, 0]
    assert batch.vision_cell[0][batch.vision_cell[0] >= 0].tolist() == list(range(16))
    places = batch.tile_places
    assert places is not None
    assert places.origin is None


def test_an_image_that_is_too_thin_is_skipped():
    with pytest.raises(SkipRecord, match="1 x 900 pixels makes a slice of 1 x") as error:
        PROCESSOR.example(asked((1, 900)))
    assert error.value.reason == "image_shape"
    with pytest.raises(SkipRecord, match="pixels makes a slice"):
        PROCESSOR.size(asked((1, 900)))


def test_windows_limit_the_shape_where_blocks_re_read_them():
    """A model without re-fusion blocks takes an image whose windows would be too large for them."""
    with pytest.raises(SkipRecord, match="a vision token would re-read") as error:
        PROCESSOR.size(asked((4600, 100)))
    assert error.value.reason == "image_shape"
    assert sliced.processor(refusion=None).size(asked((4600, 100)))[1] > 1


@pytest.mark.parametrize(("most", "grid"), [(9, (3, 3)), (8, (4, 2)), (6, (3, 2)), (7, (7, 1)), (1, (1, 1))])
def test_the_image_of_a_measurement_has_the_most_slices(most, grid):
    config = ImageConfig(tile_size=476, aspect_ratio="slices", unpad=False, max_slices=most)
    assert image_size(config) == (grid[0] * 448, grid[1] * 448)


def prompt_rows() -> list:
    found = [
        pytest.param(row, id=f"{path.stem}-prompt{number}")
        for path, document in documents("minicpm_v")
        for number, row in enumerate(document.get("prompts", {}).get("rows", ()))
    ]
    return found or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason="no recorded 'minicpm_v'"))]


@pytest.mark.parametrize("row", prompt_rows())
def test_recorded_prompts(row):
    """The text that the release builds, with the slices of the recorded size; the mirror's last <AI> stands twice."""
    config = sliced.sliced_config(refusion=None)
    encoder, projector = replace(config.encoder, image_size=476), replace(config.projector, queries=8)
    image = replace(config.image, tile_size=476, slice_size=448, max_slices=9)
    processor = Processor(sliced.tokenizer(), replace(config, encoder=encoder, projector=projector, image=image))
    turns, images = [], ()
    for message in row["conversation"]:
        parts = message["content"].split("(<image>./</image>)")
        if not images:
            # The image of a question without a place for it stands in front.
            parts = parts if len(parts) > 1 else ["", *parts]
            images = (png(*row["size"]),)
        turns.append(Turn(message["role"], *[one for part in parts for one in (IMAGE, part)][1:]))
    text = text_of(processor.prompt(Conversation("prompt", tuple(turns), images)))
    assert text == row["processor_text"].removesuffix("<AI>")
    assert text == row.get("release_chat_text", text)
    assert text.count("<image>") == row["image_bounds_count"]
