"""The page of a batch: what belongs to which sample, what is marked, and that nothing of a sample is HTML."""

import dataclasses

import numpy as np
from PIL import Image

from tests.tiny import tiny_config, tiny_decoder
from vr_jax.data.batch_page import batch_images, batch_page, samples_of, tile_png
from vr_jax.data.collate import collate
from vr_jax.data.demo.source import encode_png
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.batch import BatchShape


def conversation(name, question, answer, colour):
    pixels = np.full((24, 24, 3), colour, np.uint8)
    turns = (Turn("user", IMAGE, "\n", question), Turn("assistant", answer))
    return Conversation(name, turns, (encode_png(pixels),))


def batch():
    """Two rows, of which the first holds two samples."""
    processor = Processor(demo_tokenizer(), tiny_config(decoder=tiny_decoder(vocab_size=304)), label_quirk=False)
    first, second, third = (
        processor.example(conversation(*one))
        for one in (
            ("first", "What is the word?", "red", 10),
            ("<b>second</b>", "Which?", "<script>alert(1)</script>", 90),
            ("third", "Why?", "because", 200),
        )
    )
    rows = [[first, second], [third]]
    tokens = len(first.tokens) + len(second.tokens) + 5
    tiles = len(first.tile_pixels) + len(second.tile_pixels) + 1
    return collate(rows, BatchShape(rows=3, tokens=tokens, tiles=tiles, tile_size=24)), rows


def test_a_batch_is_divided_into_the_samples_that_it_was_made_of():
    host, rows = batch()
    found = samples_of(host)
    assert [len(row) for row in found] == [2, 1, 0]
    for samples, examples in zip(found, rows, strict=False):
        for sample, example in zip(samples, examples, strict=True):
            assert sample.id == example.id
            for field in ("tokens", "loss_mask", "text_token_mask"):
                np.testing.assert_array_equal(getattr(sample, field), getattr(example, field))
            np.testing.assert_array_equal(sample.tiles, example.tile_pixels)


def test_a_tile_becomes_an_image_with_its_colour(tmp_path):
    (tmp_path / "tile.png").write_bytes(tile_png(np.full((24, 24, 3), 90, np.uint8)))
    with Image.open(tmp_path / "tile.png") as image:
        assert image.getpixel((3, 3)) == (90, 90, 90)


def test_the_page_marks_targets_and_escapes_texts():
    host, _ = batch()
    page = batch_page(host, demo_tokenizer(), step=7, facts={"Settings": "config.seed = 0 <i>"})
    assert "The batch of update 7" in page
    assert "<mark>red&lt;|im_end|&gt;" in page
    assert "<u>What is the word?</u>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<b>&lt;b&gt;second&lt;/b&gt;</b>" in page
    assert "config.seed = 0 &lt;i&gt;" in page
    sample = samples_of(host)[0][0]
    assert f"[{(sample.vision_cell != -1).sum()} vision tokens]" in page
    assert page.count("<img ") == sum(len(sample.tiles) for row in samples_of(host) for sample in row)


def test_long_batches_are_shortened():
    host, _ = batch()
    many = dataclasses.replace(
        host,
        batch=dataclasses.replace(
            host.batch,
            **{
                field.name: np.concatenate([getattr(host.batch, field.name)] * 8)
                for field in dataclasses.fields(host.batch)
                if getattr(host.batch, field.name) is not None
            },
        ),
        record_ids=host.record_ids * 8,
    )
    page = batch_page(many, demo_tokenizer(), step=1, facts={})
    assert page.count("<h2>Row ") == 16
    assert "8 more rows are not shown" in page


def test_trackers_get_the_first_tiles_with_the_names_of_their_samples():
    host, _ = batch()
    captioned = batch_images(host, rows=1, tiles=1)
    assert [caption for _, caption in captioned] == ["first, tile 1", "<b>second</b>, tile 1"]
    assert all(png.startswith(b"\x89PNG") for png, _ in captioned)
