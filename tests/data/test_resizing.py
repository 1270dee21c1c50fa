"""Padded and cropped squares have the pixels of a real canvas, with memory that is bounded whatever the shape."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from vr_jax.data import resizing
from vr_jax.data.resizing import centred, covering_size, cropped_square, padded_square, resized

COLOUR = (127, 127, 127)
SHAPES = [(1, 2), (3, 50), (50, 3), (1, 700), (700, 1), (7, 2000), (2000, 7), (999, 100), (100, 999), (5, 30), (31, 5)]
SHAPES += [(384, 10), (10, 384), (385, 100), (20, 33), (33, 20), (64, 63), (1, 1)]

# The first digits of the SHA-256 of resized images, by filter.
RECORDED = {
    "nearest": "1645ab7041dbdd65",
    "box": "5b23681757412b08",
    "bilinear": "26e9aac66b8ed5ce",
    "hamming": "34437345a3ad2783",
    "bicubic": "3c6bc0d56485faaa",
    "lanczos": "5f89ed64fc952b2b",
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def on_a_canvas(image: Image.Image, side: int) -> np.ndarray:
    """LLaVA's way: `expand2square`, then a resize of the square."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), COLOUR)
    square.paste(image, centred(image.size, (longest, longest)))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("canvas", [0, 1 << 24], ids=["without a canvas", "with one"])
@pytest.mark.parametrize("side", [32, 384])
def test_padded_squares_have_exactly_the_pixels_of_a_canvas(monkeypatch, canvas, side):
    monkeypatch.setattr(resizing, "_SMALL_CANVAS", canvas)
    for size in SHAPES:
        image = noise(*size)
        np.testing.assert_array_equal(padded_square(image, side, COLOUR), on_a_canvas(image, side), err_msg=str(size))


@pytest.mark.parametrize("resample", RECORDED)
def test_every_version_of_pillow_gives_the_pixels_that_version_13_gave(resample):
    """Recorded with `Image.resize` of Pillow 13.0.0; sizes on both sides of where the order of the passes changes."""
    digest = hashlib.sha256()
    for size in SHAPES:
        for target in ((20, 50), (50, 20), (33, 8), (64, 65), (3, 3), (90, 1)):
            digest.update(np.asarray(resized(noise(*size), target, resample)).tobytes())
    assert digest.hexdigest()[:16] == RECORDED[resample]


def test_other_colours_and_more_rows_than_are_converted_at_a_time(monkeypatch):
    monkeypatch.setattr(resizing, "_SMALL_CANVAS", 0)
    monkeypatch.setattr(resizing, "_CONVERTED", 100)
    for size in ((9, 500), (500, 9)):
        image = noise(*size)
        np.testing.assert_array_equal(padded_square(image, 32, COLOUR), on_a_canvas(image, 32))
        assert padded_square(image, 32, (10, 200, 30))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 200_000), (200_000, 2)])
def test_a_line_of_pixels_takes_little_memory(size):
    """A canvas of 60,000 x 60,000 pixels takes 14 GB. tracemalloc sees numpy's part; Pillow's is a copy of that."""
    image = noise(*size)
    tracemalloc.start()
    found = padded_square(image, 384, COLOUR)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (384, 384, 3)
    assert peak < 64 << 20


@pytest.mark.parametrize("size", [(1000, 7), (7, 1000), (4000, 3), (3, 4000), (900, 90), (90, 900)])
@pytest.mark.parametrize("target", [(32, 32), (384, 1), (20, 50)])
def test_long_sides_are_resized_piece_by_piece_to_within_one_of_255(monkeypatch, size, target):
    monkeypatch.setattr(resizing, "_LONG_SIDE", 100)
    image = noise(*size)
    rows_first = size[0] > size[1]
    middle = (target[0], size[1]) if rows_first else (size[0], target[1])
    expected = image.resize(middle, Image.Resampling.BICUBIC).resize(target, Image.Resampling.BICUBIC)
    found = np.asarray(resized(image, target)).astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.usefixtures("pillow_13")
@pytest.mark.parametrize("side", [32, 45])
def test_cropped_squares_are_those_of_clips_processor(side):
    """Sizes whose longer side is truncated, odd margins, and images that are enlarged."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )
    # transformers takes a side of 1 or 3 pixels for the axis of the colours.
    shapes = [size for size in SHAPES if not {1, 3} & set(size)]
    for size in [*shapes, (61, 30), (30, 61), (side, 2 * side), (side + 1, side), (640, 427)]:
        image = noise(*size)
        expected = np.asarray(processor(image)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(cropped_square(image, side), expected, err_msg=str(size))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_a_cropped_square_of_a_long_image_is_computed_alone(monkeypatch, resample):
    sizes = [(700, 1), (3, 900), (5000, 7), (1000, 999)]
    wholes = [cropped_square(noise(*size), 32, resample) for size in sizes]
    monkeypatch.setattr(resizing, "_SMALL_CANVAS", 0)
    for size, whole in zip(sizes, wholes, strict=True):
        found = cropped_square(noise(*size), 32, resample)
        assert np.abs(found.astype(int) - whole).max() <= 1, size
    tracemalloc.start()
    found = cropped_square(noise(300_000, 1), 384)  # resized whole it would take 130 GB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (384, 384, 3)
    assert peak < 64 << 20
    assert covering_size((300_000, 1), 384) == (384 * 300_000, 384)
