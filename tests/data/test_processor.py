"""Conversations become examples: text, vision tokens and tiles are in place, and unusable samples state the reason."""

import contextlib
import dataclasses
import io
import os
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import GRIDS, chat, interpolating_image_config, png, small_config
from tests.model.families import family_config
from vr_jax.data import anyres, tiling
from vr_jax.data.processor import Processor, say_missing_markers
from vr_jax.data.skips import REASONS, SkipRecord
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.errors import ConfigError
from vr_jax.model.batch import NEWLINE, NO_CELL, BatchShape


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, small_config())


def decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def test_one_image(processor, tokenizer):
    image = png(70, 30)
    example = processor.example(chat("<image>\nWhat?", "A car", images=(image,)))
    expected = anyres.layout((70, 30), 2, processor.config.image)
    vision = example.vision_cell != NO_CELL
    np.testing.assert_array_equal(example.vision_cell[vision], expected.cell)
    np.testing.assert_array_equal(example.tokens[vision], tokenizer.pad_token_id)
    assert np.all(np.diff(np.flatnonzero(vision)) == 1)
    text = tokenizer.decode(example.tokens[~vision])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA car<|im_end|>\n"
    )
    assert not np.any(example.loss_mask & vision)
    assert not np.any(example.text_token_mask & vision)
    assert tokenizer.decode(example.tokens[example.text_token_mask]) == "What?"
    np.testing.assert_array_equal(example.tile_pixels, anyres.tiles(decode(image), processor.config.image))
    np.testing.assert_array_equal(example.tile_image, [1] * expected.tiles)
    assert example.cells_per_tile == 4
    assert example.vision_cells is None
    kinds = {"tokens": "i4", "vision_cell": "i4", "tile_image": "i4", "loss_mask": "?", "tile_pixels": "u1"}
    assert {name: getattr(example, name).dtype for name in kinds} == {k: np.dtype(v) for k, v in kinds.items()}


def test_several_images_get_one_padded_tile_each(processor):
    first, second = png(70, 30), png(20, 50, seed=1)
    example = processor.example(chat("<image> or <image>?", "A", images=(first, second)))
    cells = example.vision_cell[example.vision_cell != NO_CELL]
    np.testing.assert_array_equal(cells, [0, 1, 2, 3, NEWLINE, 4, 5, 6, 7, NEWLINE])
    np.testing.assert_array_equal(example.tile_image, [1, 2])
    square = Image.new("RGB", (70, 70), (127, 127, 127))
    square.paste(decode(first), (0, 20))
    np.testing.assert_array_equal(example.tile_pixels[0], np.asarray(square.resize((32, 32))))


def test_text_only(processor):
    example = processor.example(chat("Hi", "Hello"))
    assert example.tile_pixels.shape == (0, 32, 32, 3)
    assert example.tile_image.shape == (0,)
    assert np.all(example.vision_cell == NO_CELL)


def test_several_turns_with_images_in_two_of_them(processor):
    conversation = chat("<image>\nA?", "a", "Now <image> B?", "b", images=(png(), png(seed=1)))
    example = processor.example(conversation)
    assert example.tile_image.tolist() == [1, 2]
    runs = np.flatnonzero(np.diff(np.flatnonzero(example.vision_cell != NO_CELL)) > 1)
    assert len(runs) == 1


def test_bilinear_branch_carries_four_cells_per_token(tokenizer):
    image = interpolating_image_config()
    processor = Processor(tokenizer, small_config(image=image, text_pool=None))
    example = processor.example(chat("<image>\nWhat?", "A", images=(png(90, 90),)))
    expected = anyres.layout((90, 90), 2, image)
    vision = example.vision_cell != NO_CELL
    np.testing.assert_array_equal(example.vision_cells[vision], expected.cells)
    np.testing.assert_array_equal(example.vision_weights[vision], expected.weights)
    real = example.vision_cell >= 0
    np.testing.assert_allclose(example.vision_weights.sum(axis=1), real, atol=1e-6)
    # With several images each token has one cell, and the second image's cells follow those of the first.
    both = processor.example(chat("<image><image>", "A", images=(png(), png())))
    real = both.vision_cell >= 0
    np.testing.assert_array_equal(both.vision_cells[real], np.repeat(np.arange(8)[:, None], 4, axis=1))
    np.testing.assert_array_equal(both.vision_weights, real[:, None] * [[1, 0, 0, 0]])


def test_prompt_ends_with_the_assistant_header(processor, tokenizer):
    conversation = chat("<image>\nWhat?", "A car", images=(png(),))
    asked = processor.prompt(conversation)
    assert tokenizer.decode(asked.tokens[asked.vision_cell == NO_CELL]).endswith(
        "What?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not asked.loss_mask.any()
    trained = processor.example(conversation)
    n = len(asked.tokens)
    for name in ("tokens", "vision_cell", "text_token_mask"):
        np.testing.assert_array_equal(getattr(trained, name)[:n], getattr(asked, name))


def test_images_of_other_modes_and_formats(processor):
    for mode in ("L", "RGBA", "RGB"):
        encoded = png(40, 30, mode=mode)
        example = processor.example(chat("<image>", "A", images=(encoded,)))
        np.testing.assert_array_equal(example.tile_pixels, anyres.tiles(decode(encoded), processor.config.image))
    palette = io.BytesIO()
    decode(png()).convert("P").save(palette, "GIF")
    assert len(processor.example(chat("<image>", "A", images=(palette.getvalue(),))).tile_pixels) > 1


def bomb() -> bytes:
    """A PNG of a few bytes whose header states 30000 x 30000 pixels."""
    encoded = bytearray(png(10, 10))
    encoded[16:24] = (30000).to_bytes(4, "big") * 2
    encoded[29:33] = zlib.crc32(bytes(encoded[12:29])).to_bytes(4, "big")
    return bytes(encoded)


UNUSABLE = {
    "no placeholder": (chat("What?", "A", images=(png(),)), "image_count"),
    "two placeholders": (chat("<image><image>", "A", images=(png(),)), "image_count"),
    "no image": (chat("<image>\nWhat?", "A"), "image_count"),
    "not an image": (chat("<image>", "A", images=(b"hello",)), "broken_image"),
    "empty file": (chat("<image>", "A", images=(b"",)), "broken_image"),
    "cut off": (chat("<image>", "A", images=(png(60, 60)[:-4000],)), "broken_image"),
    "postscript": (
        chat("<image>", "A", images=(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",)),
        "broken_image",
    ),
    "a bomb": (chat("<image>", "A", images=(bomb(),)), "image_too_large"),
    "unknown role": (Conversation("x", (Turn("tool", "Q"), Turn("assistant", "A"))), "unknown_role"),
    "no turns": (Conversation("x", ()), "empty_conversation"),
    "too long": (chat("Q " * 300, "A"), "too_long"),
    "too long with its image": (chat("<image>" + "Q" * 190, "A", images=(png(90, 30),)), "too_long"),
    "too many tiles": (chat("<image>" * 6, "A", images=(png(),) * 6), "too_many_tiles"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_samples(processor, name):
    conversation, reason = UNUSABLE[name]
    limited = processor.limited_to(BatchShape(rows=1, tokens=220, tiles=5, tile_size=32))
    with pytest.raises(SkipRecord) as caught:
        limited.example(conversation)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert "\n" not in caught.value.as_skip("x").detail


def test_unusable_files(processor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # Opening it for reading would wait for ever.
    (tmp_path / "folder.png").mkdir()
    for name in ("absent.png", "folder.png", "pipe.png"):
        with pytest.raises(SkipRecord) as caught:
            processor.example(chat("<image>", "A", images=(tmp_path / name,)))
        assert caught.value.reason == "missing_image"
        assert name in caught.value.detail


@pytest.mark.parametrize("position", range(33, 2000, 131))
def test_damaged_files_are_skipped_not_fatal(processor, position):
    for original in (png(60, 60), jpeg()):
        damaged = bytearray(original)
        damaged[position : position + 40] = b"\xff" * 40
        # A JPEG decoder tolerates much damage, so that image may also be decoded.
        expected = pytest.raises(SkipRecord) if original[:4] == b"\x89PNG" else contextlib.suppress(SkipRecord)
        with expected:
            processor.example(chat("<image>", "A", images=(bytes(damaged),)))


def jpeg() -> bytes:
    stream = io.BytesIO()
    decode(png(60, 60)).save(stream, "JPEG")
    return stream.getvalue()


def test_pixel_limit_is_configurable(processor):
    small = dataclasses.replace(processor, max_pixels=100)
    with pytest.raises(SkipRecord, match=r"10 x 11 pixels, but at most 100 are allowed \(`max_pixels`\)"):
        small.example(chat("<image>", "A", images=(png(10, 11),)))
    small.example(chat("<image>", "A", images=(png(10, 10),)))


@pytest.mark.parametrize("images", [(), (png(),)], ids=["text", "image"])
def test_a_reply_and_a_question_may_mention_a_placeholder(processor, tokenizer, images):
    turns = (Turn("user", *[IMAGE] * len(images), "The tag <image>?"), Turn("assistant", "It is <image>."))
    example = processor.example(Conversation("x", turns, images))
    text = tokenizer.decode(example.tokens[example.vision_cell == NO_CELL])
    assert "The tag <image>?" in text
    assert "It is <image>." in text
    assert len(set(example.tile_image.tolist())) == len(images)


def test_processors_travel_to_workers(processor):
    """A pickled processor leaves out the Hugging Face tokenizer, which would import torch in the worker."""
    copy = pickle.loads(pickle.dumps(processor))
    assert b"transformers" not in pickle.dumps(processor)
    conversation = chat("<image>\nWhat?", "A", images=(png(),))
    expected, found = processor.example(conversation), copy.example(conversation)
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_vocabulary_must_hold_the_tokenizer(tokenizer):
    config = small_config()
    small = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=100))
    with pytest.raises(ConfigError, match=r"decoder.vocab_size = 100: the tokenizer has \d+ tokens"):
        Processor(tokenizer, small)


def test_every_grid_of_the_small_model_is_selected_for_some_size(processor):
    selected = {anyres.select_grid(size, GRIDS, 32) for size in [(30, 30), (30, 64), (64, 30), (90, 30), (64, 64)]}
    assert selected == {(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)}


@pytest.mark.parametrize("images", [(), (png(70, 30),), (png(70, 30), png(20, 50))], ids=["none", "one", "two"])
def test_the_size_is_known_without_decoding(processor, images):
    conversation = chat("<image>" * len(images) + "What?", "A", "And?", "B", images=images)
    example = processor.example(conversation)
    cut = tuple(image[:60] for image in images)  # This keeps only the header of each file.
    assert processor.size(dataclasses.replace(conversation, images=cut)) == (
        len(example.tokens),
        len(example.tile_pixels),
    )
    with pytest.raises(SkipRecord, match="too_long"):
        dataclasses.replace(processor, max_tokens=len(example.tokens) - 1).size(conversation)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "minicpm_v"])
def test_a_chat_format_without_markers_leaves_them_out_and_says_so(tokenizer, family, caplog):
    """Any decoder can be asked about the images of any encoder; a wide and a small image have markers of all kinds."""
    base = family_config(family)
    config = dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, vocab_size=512))
    say_missing_markers.cache_clear()
    processor = Processor(tokenizer, config)
    dataclasses.replace(processor, max_tokens=9)
    (warning,) = caplog.messages  # once for both
    assert warning.startswith(f"The chat format {config.template!r} has no token for image_start, image_end")
    assert ("slice_start, slice_end, row_end" in warning) == (family == "minicpm_v")
    sizes, conversation = [(45, 30), (9, 8)], chat("<image>A<image>?", "B", images=(png(45, 30), png(9, 8)))
    example = processor.example(conversation)
    vision = example.vision_cell != NO_CELL
    layouts = [tiling.layout(size, config) for size in sizes]
    assert all(np.any(one.marker) for one in layouts)
    cells = np.concatenate([one.cell[one.cell != NO_CELL] for one in layouts])
    cells[np.count_nonzero(layouts[0].cell != NO_CELL) :] += layouts[0].tiles * config.cells_per_tile
    np.testing.assert_array_equal(example.vision_cell[vision], cells)
    text = tokenizer.decode(example.tokens[~vision])
    assert text.endswith("<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n")
    assert processor.size(conversation) == (len(example.tokens), len(example.tile_pixels))
    if example.positions is not None:  # Text counts on, and the first token of an image follows the text before it.
        steps = np.diff(example.positions.max(axis=1))[~vision[1:] & ~vision[:-1]]
        assert np.all(steps == 1)
        begins = np.flatnonzero(vision & ~np.append(False, vision[:-1]))
        np.testing.assert_array_equal(example.positions[begins], example.positions[begins - 1] + 1)
