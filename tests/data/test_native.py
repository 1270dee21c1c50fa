"""Windows of images of any size, compared with the image processor of transformers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vr_jax.data import native
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Marker
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig

transformers = pytest.importorskip("transformers")
PATCH, STRIDE = 14, 2
# The mean and the deviation of CLIP, which Qwen2.5-VL has.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG = ImageConfig(
    tile_size=112,
    aspect_ratio="native",
    unpad=False,
    min_pixels=3136,
    max_pixels=200_000,
    image_mean=MEAN,
    image_std=STD,
)
# Sizes (width, height): whole windows, partial ones, one cell, enlarged ones, shrunk ones, and thin ones.
SIZES = ((224, 112), (300, 199), (31, 90), (3, 4), (900, 700), (500, 20), (9, 700))


def reference(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that transformers resizes an image to."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = size
    height, width = smart_resize(height, width, PATCH * STRIDE, CONFIG.min_pixels, CONFIG.max_pixels)
    return width, height


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_any_size_is_resized_or_refused_as_transformers_does(width, height):
    try:
        expected = reference((width, height))
    except ValueError:
        with pytest.raises(SkipRecord, match="at most 200 times"):
            native.resized_size((width, height), PATCH, STRIDE, CONFIG)
    else:
        assert native.resized_size((width, height), PATCH, STRIDE, CONFIG) == expected


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_an_image_without_area_is_skipped_with_its_reason(size):
    with pytest.raises(SkipRecord, match="no area") as error:
        native.layout(size, PATCH, STRIDE, CONFIG)
    assert error.value.reason == "image_shape"


def in_processor_order(tiles: np.ndarray, layout, config: ImageConfig) -> np.ndarray:
    """The pixels of transformers' processor, (patches, channel * frame * row * column), of windows and a layout."""
    side, cells = PATCH * STRIDE, config.tile_size // (PATCH * STRIDE)
    numbers = layout.cell[layout.cell >= 0]
    tile, rest = np.divmod(numbers, cells**2)
    row, column = np.divmod(rest, cells)
    patches = []
    for t, r, c in zip(tile, row, column, strict=True):
        cell = tiles[t, r * side : (r + 1) * side, c * side : (c + 1) * side].astype(np.float64)
        cell = (cell / 255 - config.image_mean) / config.image_std
        cell = cell.reshape(STRIDE, PATCH, STRIDE, PATCH, 3).transpose(0, 2, 4, 1, 3)
        patches.append(np.repeat(cell.reshape(-1, 3, 1, PATCH, PATCH), 2, axis=2).reshape(STRIDE**2, -1))
    return np.concatenate(patches)


@pytest.mark.usefixtures("pillow_13")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_windows_hold_the_pixels_of_transformers_processor(size):
    """The vision tokens in their order hold the processor's patches, and what lies beyond the image is zero."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    found, layout = native.tiles(image, PATCH, STRIDE, CONFIG), native.layout(size, PATCH, STRIDE, CONFIG)
    limits = {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
    expected = Qwen2VLImageProcessorPil(size=limits)(image, return_tensors="np")
    assert found.shape == (layout.tiles, 112, 112, 3)
    # Differences of float32 in values up to 2.7, measured 2.4e-7.
    np.testing.assert_allclose(in_processor_order(found, layout, CONFIG), expected["pixel_values"], rtol=0, atol=2e-6)
    for window, (rows, columns) in zip(found, layout.extent * PATCH, strict=True):
        assert window[:rows, :columns].any()
        assert not window[rows:].any()
        assert not window[:, columns:].any()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 4]))
def test_layout_places_each_cell_of_the_image_once(width, height, stride, cells):
    """Cells, places, extents and origins agree with one another for any size, stride and window."""
    if max(width, height) > 200 * min(width, height):
        return
    config = ImageConfig(
        tile_size=4 * stride * cells, aspect_ratio="native", unpad=False, min_pixels=64, max_pixels=40_000
    )
    layout = native.layout((width, height), 4, stride, config)
    real = layout.marker == Marker.NONE
    assert layout.marker[[0, -1]].tolist() == [Marker.IMAGE_START, Marker.IMAGE_END]
    assert real[1:-1].all()
    assert (layout.cell[~real] == NO_CELL).all()
    assert (layout.place[~real] == -1).all()
    new_width, new_height = native.resized_size((width, height), 4, stride, config)
    rows, columns = new_height // (4 * stride), new_width // (4 * stride)
    np.testing.assert_array_equal(layout.place[real], np.indices((rows, columns)).reshape(2, -1).T)
    tile, rest = np.divmod(layout.cell[real], cells**2)
    inside = np.stack(np.divmod(rest, cells), axis=-1)
    np.testing.assert_array_equal(layout.origin[tile] + inside * stride, layout.place[real] * stride)
    assert (inside * stride < layout.extent[tile]).all()
    assert layout.extent.prod(axis=1).sum() == rows * columns * stride**2
    assert layout.tiles == len(layout.extent) == len(layout.origin) == np.prod(layout.grid)
    assert len(np.unique(layout.cell[real])) == rows * columns


def test_layouts_are_shared_and_cannot_be_changed():
    """Two images that are resized alike share one layout, since a large one takes 0.3 MB."""
    one, other = (native.layout(size, PATCH, STRIDE, CONFIG) for size in ((224, 112), (225, 113)))
    assert one is other
    with pytest.raises(ValueError, match="read-only"):
        one.cell[0] = 0


def test_placement_is_the_resized_image_on_its_windows():
    place = native.placement((300, 199), PATCH, STRIDE, CONFIG)
    assert (place.columns, place.rows) == native.layout((300, 199), PATCH, STRIDE, CONFIG).grid
    assert (place.left, place.top, place.width, place.height) == (0, 0, *reference((300, 199)))
