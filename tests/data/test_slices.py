"""Slices of images of any size: what holds for all of them, and which images have no place in a slot."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.sliced import unpacked
from vr_jax.data import slices
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Marker
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig

MINICPM = ImageConfig(tile_size=476, aspect_ratio="slices", unpad=False)
SMALL = ImageConfig(tile_size=84, aspect_ratio="slices", unpad=False, slice_size=56, max_slices=4)


@settings(deadline=None, max_examples=300)
@given(st.integers(8, 6000), st.floats(1 / 60, 60))
def test_every_image_up_to_60_to_1_has_a_place(side, ratio):
    """docs/data.md states that no image of an aspect ratio up to 60 is skipped."""
    width, height = max(1, round(side * math.sqrt(ratio))), max(1, round(side / math.sqrt(ratio)))
    if not 1 / 60 <= width / height <= 60:
        return
    found = slices.layout((width, height), 14, 8, MINICPM)
    assert 1 <= found.tiles <= MINICPM.max_tiles_per_image
    assert found.tiles == len(found.extent)
    assert (found.extent.prod(axis=1) <= 34 * 34).all()
    cells = found.cell[found.cell >= 0]
    np.testing.assert_array_equal(cells, np.arange(64 * found.tiles))
    assert ((found.cell == NO_CELL) == (found.marker != Marker.NONE)).all()


def test_images_beyond_the_most_slices_are_resized():
    """65,535 x 65,535 pixels are 21,399 times a slice; there are nine, as for 1344 x 1344 pixels."""
    large, largest = (slices.layout(size, 14, 8, MINICPM) for size in ((1344, 1344), (65_535, 65_535)))
    assert large.tiles == largest.tiles == 10
    np.testing.assert_array_equal(large.extent, largest.extent)


def test_an_image_is_never_cut_where_one_slice_is_the_most():
    config = replace(MINICPM, max_slices=1)
    assert slices.layout((4000, 3000), 14, 8, config).tiles == 1
    assert slices.layout((4000, 3000), 14, 8, config).grid is None


@pytest.mark.parametrize("size", [(5000, 5), (3, 20_000), (3000, 30)])
def test_a_thin_image_is_skipped_with_its_reason(size):
    """A slice has one patch along its short side at least, and then more along the long one than fit."""
    with pytest.raises(SkipRecord, match=rf"{size[0]} x {size[1]} pixels makes a slice of .* patches, .* 900") as error:
        slices.layout(size, 14, 8, replace(MINICPM, tile_size=420))
    assert error.value.reason == "image_shape"
    with pytest.raises(SkipRecord) as error:
        slices.tiles(Image.new("RGB", size), 14, replace(MINICPM, tile_size=420))
    assert error.value.reason == "image_shape"


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_skipped(size):
    with pytest.raises(SkipRecord, match=f"{size[0]} x {size[1]} pixels, which is no area") as error:
        slices.layout(size, 14, 8, MINICPM)
    assert error.value.reason == "image_shape"


@pytest.mark.usefixtures("pillow_13")
def test_pieces_are_cut_from_one_resized_image():
    """The pieces, put together, are the image as Pillow resizes it; the overview is another resizing of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(pixels)
    found, laid_out = slices.tiles(image, 14, SMALL), slices.layout(image.size, 14, 2, SMALL)
    assert laid_out.grid == (2, 2)
    images = [unpacked(slot, extent, 14) for slot, extent in zip(found, laid_out.extent.tolist(), strict=True)]
    together = np.concatenate([np.concatenate(images[k : k + 2], axis=1) for k in (1, 3)])
    height, width = together.shape[:2]
    np.testing.assert_array_equal(together, np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
    overview = image.resize(images[0].shape[1::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[0], np.asarray(overview))


def test_markers_surround_slices_and_rows():
    """Two rows of two pieces with one cell each: a newline stands between the rows, and none before them."""
    found = slices.layout((120, 90), 14, 1, SMALL)
    one = [Marker.IMAGE_START, Marker.NONE, Marker.IMAGE_END]
    rows = [*one, *one, Marker.ROW_END, *one, *one]
    np.testing.assert_array_equal(found.marker, [*one, Marker.SLICE_START, *rows, Marker.SLICE_END])
    with pytest.raises(ValueError, match="read-only"):
        found.cell[0] = 1  # The layout is shared by all images of this size.
