"""Tests of heat maps: the place of each patch on the original image, and the whole way from items to maps."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from tests.inference import tiny
from tests.model.families import family_config
from tests.tiny import randomized, tiny_config, tiny_encoder
from vr_jax.data import anyres, tiling
from vr_jax.data.processor import Processor
from vr_jax.errors import UserError
from vr_jax.evaluation import attention_maps as maps
from vr_jax.evaluation import batching
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.evaluation.report import heat_png
from vr_jax.inference import Generator
from vr_jax.model.config import ImageConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import Reread
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.model.windows import to_windows
from vr_jax.sharding import make_mesh, param_shardings

# A tile has 48 x 48 pixels, i.e. 4 x 4 cells of 3 x 3 patches of 4 x 4 pixels.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (3, 3))
CONFIG = tiny_config(
    encoder=tiny_encoder(image_size=48),
    projector=PoolConfig(stride=3),
    image=ImageConfig(tile_size=48, aspect_ratio="anyres", grids=GRIDS),
)
SIZES = {
    "grid without padding": (96, 48),
    "wide, partly padded patches": (401, 170),
    "wide": (300, 90),
    "tall": (70, 333),
    "square": (200, 200),
    "square, small": (50, 50),
    "extreme": (2000, 211),
    "extreme, tall": (90, 800),
}


def with_image(**changes):
    return dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, **changes))


def values_of_tiles(tiles: np.ndarray, config) -> np.ndarray:
    """Returns the mean of the red channel of each patch, with shape (T, G, G)."""
    grid, patch = config.encoder.grid, config.encoder.patch_size
    red = tiles[..., 0].astype(np.float64)[:, : grid * patch, : grid * patch]
    return red.reshape(-1, grid, patch, grid, patch).mean(axis=(2, 4))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("mode", ["grid", "base", "first of several", "square", "pad"])
def test_patches_lie_where_the_image_shows_them(name: str, mode: str):
    """The grey of the test image grows from left to right, then from top to bottom.

    The map places the patches of the processor's tiles back on the image. The grey must grow there in the same way.
    """
    config = with_image(aspect_ratio=mode) if mode in ("square", "pad") else CONFIG
    alone, size = mode != "first of several", SIZES[name]
    place = anyres.placement(size, config.image, alone=alone, base=mode == "base")

    def shown(pixels: np.ndarray) -> np.ndarray:
        grey = np.broadcast_to(pixels.round().astype(np.uint8), size[::-1])
        tiles = anyres.tiles(Image.fromarray(np.repeat(grey[..., None], 3, axis=2)), config.image, alone=alone)
        return maps.on_image(values_of_tiles(tiles, config), place, size, config)

    # An edge patch mixes image and padding. Two plain images give the share of the image in each patch.
    dark, bright = shown(np.full((1, 1), 40.0)), shown(np.full((1, 1), 240.0))
    share = (bright - dark) / 200
    assert share.min() >= 0, "every place has a patch"
    height, width = dark.shape
    assert max(dark.shape) >= maps.MIN_SIDE
    assert abs(width / height - size[0] / size[1]) <= (1 + size[0] / size[1]) / min(dark.shape)
    for axis, extent in ((1, place.width), (0, place.height)):
        count = dark.shape[axis]
        places = (40 + 200 * (np.arange(n) + 0.5) / n for n in (size[1 - axis], count))
        image, expected = (np.expand_dims(ramp, 1 - axis) for ramp in places)
        found = 40 + (shown(image) - dark) / np.maximum(share, 1e-9)
        one_patch = 200 * config.encoder.patch_size / extent
        inside = share > 0.5
        assert inside.mean() > 0.5
        error = np.abs(found - expected)[inside]
        assert error.max() <= one_patch + 4, (error.max(), one_patch)
        assert error.mean() <= one_patch / 2 + 2, (error.mean(), one_patch)


@pytest.mark.parametrize("name", SIZES)
def test_one_patch_lands_on_its_pixels_and_cropped_cells_are_empty(name: str):
    """One cell gives all its weight to one patch, whose region is computed pixel by pixel with separate arithmetic."""
    size = SIZES[name]
    layout = anyres.layout(size, CONFIG.cells_per_side, CONFIG.image)
    columns, rows = layout.grid
    scale = min(columns * 48 / size[0], rows * 48 / size[1])
    padding = [(full * 48 - extent * scale) / 2 for full, extent in zip((columns, rows), size, strict=True)]
    raster = np.zeros((layout.tiles * 16, 9), np.float32)
    raster[layout.cell[layout.cell >= 0]] = 1 / 9
    chosen = int(layout.cell[layout.cell >= 16][len(layout.cell) // 5])  # This is a cell of the grid.
    raster[chosen] = np.eye(9)[5]  # The patch lies in the middle row, at the right.
    weights = raster.reshape(layout.tiles, 16, 9)
    found = maps.on_image(maps.relative_weights(weights), anyres.placement(size, CONFIG.image), size, CONFIG)

    tile, cell = divmod(chosen, 16)
    left = (tile - 1) % columns * 48 + cell % 4 * 12 + 8
    top = (tile - 1) // columns * 48 + cell // 4 * 12 + 4
    tokens = {int(c) for c in layout.cell if c >= 16}
    for y, x in np.ndindex(found.shape):
        at = [
            (place + 0.5) / extent * whole * scale + pad
            for place, extent, whole, pad in zip((x, y), found.shape[::-1], size, padding, strict=True)
        ]
        near = min(min(abs(a - edge) for edge in range(0, 145, 4)) for a in at)
        if near < 0.6:  # The resized image can be a pixel larger than computed here, and half a pixel off centre.
            continue
        cell_at = (1 + at[1] // 48 * columns + at[0] // 48) * 16 + at[1] % 48 // 12 * 4 + at[0] % 48 // 12
        if int(cell_at) not in tokens:
            assert np.isnan(found[y, x])
        elif left <= at[0] < left + 4 and top <= at[1] < top + 4:
            assert found[y, x] == 9
        elif int(cell_at) == chosen:
            assert found[y, x] == 0
        else:
            assert found[y, x] == pytest.approx(1)
    assert (found == 9).any()


def test_window_order_and_pixels_that_no_patch_sees():
    """Patches keep their places on the way through windows, and the 2 pixels beside 12 patches of 4 have no value."""
    raster = np.arange(1, 145, dtype=np.float32).reshape(1, 144, 1)
    windows = np.asarray(to_windows(raster, 3))[..., 0]
    np.testing.assert_array_equal(maps.relative_weights(windows).reshape(-1), 9 * raster.reshape(-1))
    config = dataclasses.replace(
        CONFIG, encoder=tiny_encoder(image_size=50), image=ImageConfig(tile_size=50, aspect_ratio="square")
    )
    found = maps.on_image(np.ones((1, 12, 12)), anyres.placement((100, 100), config.image), (100, 100), config)
    assert np.isnan(found).all(axis=0).sum() == np.isnan(found).all(axis=1).sum() == round(len(found) * 2 / 50)
    assert np.isnan(found[:, -1]).all()
    assert np.isnan(found[-1]).all()


@pytest.mark.parametrize("size", [(96, 48), (401, 170), (70, 333), (200, 200), (500, 9)])
def test_a_crop_shows_its_patches_in_the_middle_of_the_image(size):
    """Outside the square in the middle nothing is seen; inside, columns and rows of patches follow one another."""
    config = with_image(aspect_ratio="crop")
    place = anyres.placement(size, config.image)
    found = maps.on_image(np.arange(1.0, 145.0).reshape(1, 12, 12), place, size, config)
    height, width = found.shape
    assert max(found.shape) <= max(maps.MIN_SIDE, 12 * maps.PIXELS_PER_PATCH)
    seen = ~np.isnan(found)
    for axis, (extent, count) in enumerate(((size[1], height), (size[0], width))):
        inside = np.flatnonzero(seen.any(axis=1 - axis))
        middle, side = count / 2, min(size) / extent * count
        assert abs(inside[0] - (middle - side / 2)) <= 1.5
        assert abs(inside[-1] + 1 - (middle + side / 2)) <= 1.5
    if min(found.shape) > 12:
        assert np.unique(found[seen]).tolist() == list(range(1, 145))
        inner = found[seen.any(axis=1)][:, seen.any(axis=0)]
        assert (np.diff(inner, axis=0) >= 0).all()
        assert (np.diff(inner, axis=1) >= 0).all()


@pytest.mark.parametrize("size", [(40, 24), (61, 33), (9, 100), (300, 20)], ids=str)
def test_windows_lie_where_the_image_shows_them(size):
    """Windows of an image of any size form one map of the whole image, partial windows at its edges included."""
    image = ImageConfig(tile_size=16, aspect_ratio="native", unpad=False, min_pixels=256, max_pixels=4096)
    config = family_config("qwen2_5_vl", image=image)
    layout, place = tiling.layout(size, config), tiling.placement(size, config)
    assert layout.tiles == place.columns * place.rows
    # The grey grows from left to right, and then from top to bottom.
    for axis in (0, 1):
        ramp = np.linspace(20, 235, size[axis])
        grey = np.broadcast_to(ramp if axis == 0 else ramp[:, None], size[::-1]).round().astype(np.uint8)
        tiles = tiling.tiles(Image.fromarray(np.repeat(grey[..., None], 3, axis=2)), config)
        found = maps.on_image(values_of_tiles(tiles, config), place, size, config)
        expected = np.linspace(20, 235, found.shape[1 - axis])
        expected = np.broadcast_to(expected if axis == 0 else expected[:, None], found.shape)
        one_patch = 215 * 4 / (place.width, place.height)[axis]
        assert np.abs(found - expected).max() <= one_patch + 8
    # A map has a value where a token is, which is everywhere, also where windows are partial.
    weights = np.zeros((layout.tiles * 4, 4), np.float32)
    weights[layout.cell[layout.cell >= 0]] = 1 / 4
    weights[layout.cell[1]] = np.eye(4)[0]
    shown = maps.on_image(maps.relative_weights(weights.reshape(-1, 4, 4)), place, size, config)
    assert not np.isnan(shown).any()
    assert shown[0, 0] == 4
    assert shown[-1, -1] == 1
    reread = Reread(weights=weights.reshape(-1, 4, 4), update=np.ones((layout.tiles, 4), np.float32))
    assert len(maps.heat_maps([reread, reread], size, config)) == 2


def test_notes_and_colours():
    weights = np.full((3, 16, 9), 1 / 9, np.float32)
    weights[1, 2], weights[2] = np.eye(9)[0], 0
    update = np.zeros((3, 16), np.float32)
    update[0], update[1] = 9.0, np.linspace(0.01, 0.16, 16)
    config = dataclasses.replace(CONFIG, refusion=dataclasses.replace(CONFIG.refusion, insert_after=(2,)))
    one = Reread(weights=weights, update=update)
    (of_grid,) = maps.heat_maps([one], (96, 48), config)
    assert of_grid.label == "after layer 2"
    assert of_grid.note == "largest weight 9.00 times uniform; median update 8.5% of a token's state, largest 16.0%"
    expected = maps.on_image(maps.relative_weights(weights), anyres.placement((96, 48), config.image), (96, 48), config)
    assert np.isnan(expected[:, expected.shape[1] // 2 :]).all()
    assert of_grid.png == heat_png(expected)
    image = np.asarray(Image.open(io.BytesIO(of_grid.png)).convert("RGBA"))
    assert (image[..., 3] > 0).any()
    assert (image[np.isnan(expected), 3] == 0).all()
    (of_base,) = maps.heat_maps([one], (96, 48), config, base=True)
    assert of_base.note.startswith("largest weight 1.00 times uniform; median update 900.0%")
    (of_several,) = maps.heat_maps([one], (96, 48), config, images=2)
    assert of_several.note.startswith("the first of 2 images; largest weight 1.00")


@pytest.mark.parametrize("size", [(2000, 31), (9, 800)])
def test_an_image_whose_grid_is_all_cropped_shows_its_base_tile(size):
    layout = anyres.layout(size, CONFIG.cells_per_side, CONFIG.image)
    assert layout.cell.max() < 16
    weights = np.zeros((layout.tiles, 16, 9), np.float32)
    weights[0] = 1 / 9
    one = Reread(weights=weights, update=np.ones((layout.tiles, 16), np.float32))
    config = dataclasses.replace(CONFIG, refusion=dataclasses.replace(CONFIG.refusion, insert_after=(2,)))
    assert maps.heat_maps([one], size, config) == maps.heat_maps([one], size, config, base=True)


class Asked(Benchmark):
    name, title, headline = "asked", "Asked", "exact"

    def prompt(self, item: Item) -> str:
        return item.question


def items() -> list[Item]:
    def item(name: str, *images: bytes, problem: str | None = None) -> Item:
        return Item(name, "Which?", ("x",), "all", images=images, problem=problem)

    return [
        item("wide", tiny.png(48, 24, 1)),
        item("text"),
        item("broken", b"no image"),
        item("two", tiny.png(24, 24, 3), tiny.png(30, 20, 4)),
        item("bad", tiny.png(24, 24, 3), problem="no answer"),
        item("tall", tiny.png(20, 48, 5)),
    ]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return random_model(tiny.config())


def random_model(config) -> VisionLanguageModel:
    return randomized(abstract_model(config))


@pytest.mark.slow  # It compiles generation with weights; model/test_reread.py compares the weights.
def test_every_item_that_can_be_asked_has_its_maps(model):
    """The maps in batches of two equal those of each item alone, and eight devices compute the same weights."""
    generator, processor = Generator(model, tiny.TOKENIZER, tiny.BUCKETS), Processor(tiny.TOKENIZER, tiny.config())
    found = maps.maps_of_items(generator, processor, Asked(), items(), batch_size=2, progress=False)
    assert [len(of_item) for of_item in found] == [1, 0, 0, 1, 0, 1]
    prompts = {5: tiny_prompt(processor, items()[5])}
    (alone,) = maps.rereads(generator, prompts, rows=2).values()
    assert found[5] == maps.heat_maps(alone, (20, 48), model.config)
    assert Image.open(io.BytesIO(found[5][0].png)).size == (40, maps.MIN_SIDE)
    assert found[3][0].note.startswith("the first of 2 images; ")

    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        sharded = Generator(jax.device_put(model, param_shardings(model, mesh)), tiny.TOKENIZER, tiny.BUCKETS)
        (other,) = maps.rereads(sharded, prompts, rows=4).values()
    np.testing.assert_allclose(other[0].weights, alone[0].weights, atol=1e-5)


def tiny_prompt(processor: Processor, item: Item):
    return batching.prompt_of(processor, Asked(), item)


def test_a_model_without_local_attention_is_refused():
    generator = Generator(random_model(tiny.config(vision_remember=False)), tiny.TOKENIZER, tiny.BUCKETS)
    processor = Processor(tiny.TOKENIZER, tiny.config(vision_remember=False))
    with pytest.raises(UserError, match="heat maps are not possible: only Vision Remember re-reads"):
        maps.maps_of_items(generator, processor, Asked(), items(), progress=False)
