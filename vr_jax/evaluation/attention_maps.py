"""What LLaVA-VR re-read, as heat maps over the images of a benchmark's items: one for each insertion.

A map shows how each vision token spreads its local cross-attention over the patches of its own window, relative to
uniform (1). It compares patches within a window, never windows with each other: how much a token re-read at all is the
size of its update, which the notes give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from vr_jax.data.anyres import Placement, placement
from vr_jax.data.images import open_image
from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.distributed import gather, together
from vr_jax.errors import UserError
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.evaluation.report import HeatMap, heat_png
from vr_jax.evaluation.runner import batches
from vr_jax.inference import Generator, on_devices
from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.vision_remember import Reread
from vr_jax.model.reread import reread, reread_refusal
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model.windows import to_raster
from vr_jax.sharding import constrain

PIXELS_PER_PATCH = 4  # of a map, along its longer side: edge patches can be partly padding
MIN_SIDE = 96  # pixels of the longer side


def attention_maps(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> list[tuple[HeatMap, ...]]:
    """For each item the maps over its first image, one for each insertion; none for an item without images, or one
    that cannot be asked.

    Run it as `evaluate` is run: under the same mesh, all processes together; each prepares its share of every batch and
    all get all maps. Raises UserError for a model whose re-fusion block has no local cross-attention."""
    config = generator.model.config
    if refusal := reread_refusal(config):
        raise UserError(f"heat maps: {refusal}")
    todo = [number for number, item in enumerate(items) if item.images and item.problem is None]
    shown = progress and jax.process_index() == 0
    maps: list[tuple[HeatMap, ...]] = [()] * len(items)
    with tqdm(total=len(todo), unit="item", desc="heat maps", disable=not shown) as bar:
        for rows, batch, prepared in batches(generator, processor, benchmark, items, todo, batch_size):
            prompts = {number: prompt for number, prompt in prepared.items() if isinstance(prompt, Example)}
            own = together(partial(_first_sizes, items, prompts))
            images = {int(number): (width, height) for one in gather(own) for number, (width, height) in one.items()}
            if images:
                for number, found in rereads(generator, prompts, rows).items():
                    maps[number] = heat_maps(found, images[number], config, images=len(items[number].images))
            bar.update(len(batch))
    return maps


def rereads(generator: Generator, prompts: Mapping[int, Example], rows: int) -> dict[int, tuple[Reread, ...]]:
    """One batch of numbered prompts (see `Generator.generate_rows`) -> what each of them re-read at every insertion,
    host arrays of one row: weights (T, C, S), update (T, C). Every process gets those of all processes.

    Raises PromptTooLong, and ConfigError for a model without local cross-attention."""
    found, numbers = _reread_rows(generator.model, *on_devices(generator.batch(prompts, rows)))
    found, numbers = jax.tree.map(np.asarray, (found, numbers))
    return {
        int(number): jax.tree.map(lambda x, row=row: x[row], found) for row, number in enumerate(numbers) if number >= 0
    }


@jax.jit
def _reread_rows(
    model: VisionLanguageModel, batch: Batch, numbers: Int[Array, " B"]
) -> tuple[tuple[Reread, ...], Int[Array, " B"]]:
    return reread(model, batch), constrain(numbers, None)


def heat_maps(
    found: Sequence[Reread], size: tuple[int, int], config: VlmConfig, *, images: int = 1, base: bool = False
) -> tuple[HeatMap, ...]:
    """A prompt's Rereads (`rereads`) as images over its first image, of `size` (width, height) in pixels.

    images: how many the prompt has. base: from the squashed base tile also where there is a grid of tiles."""
    assert config.refusion is not None
    place = placement(size, config.image, alone=images == 1, base=base)
    tiles = slice(place.first, place.first + place.columns * place.rows)
    if not any(one.weights[tiles].any() for one in found):  # an image so narrow that unpad leaves no row of its grid
        place, tiles = placement(size, config.image, alone=images == 1, base=True), slice(0, 1)
    if not all(one.weights[tiles].any() for one in found):
        return ()
    which = f"first of {images} images; " if images > 1 else ""
    maps = []
    for layer, one in zip(config.refusion.insert_after, found, strict=True):
        ratios = on_image(relative_weights(np.asarray(one.weights)), place, size, config)
        update = one.update[tiles][one.weights[tiles].any(axis=-1)]
        note = (
            f"{which}at most {one.weights[tiles].max(initial=0) * one.weights.shape[-1]:.2f} x uniform; update "
            f"{np.median(update):.1%} of a token's state, at most {update.max():.1%}"
        )
        maps.append(HeatMap(f"after layer {layer}", heat_png(ratios), note))
    return tuple(maps)


def relative_weights(weights: Float[np.ndarray, "T C S"]) -> Float[np.ndarray, "T G G"]:
    """Each tile as a raster of its patches: weight over the uniform one, NaN where no token could read."""
    tiles, cells, patches = weights.shape
    relative = np.where(weights.any(axis=-1, keepdims=True), weights * patches, np.nan)
    grid = round((cells * patches) ** 0.5)
    return np.asarray(to_raster(relative[..., None])).reshape(tiles, grid, grid)  # type: ignore[arg-type]


def on_image(
    tiles: Float[np.ndarray, "T G G"], place: Placement, size: tuple[int, int], config: VlmConfig
) -> Float[np.ndarray, "H W"]:
    """Values of patches where the patches lie on the image, of its aspect, nearest neighbour; padding is cropped.

    NaN where no patch of a token lies; also at the right and bottom of a tile that is no multiple of the patch size."""
    side, patch, grid = config.image.tile_size, config.encoder.patch_size, tiles.shape[-1]
    longer = max(MIN_SIDE, round(PIXELS_PER_PATCH * max(place.width, place.height) / patch))
    width, height = (max(1, round(longer * extent / max(size))) for extent in size)
    column, x = np.divmod(place.left + (np.arange(width) + 0.5) * place.width / width, side)
    row, y = np.divmod(place.top + (np.arange(height) + 0.5) * place.height / height, side)
    tile = (place.first + row[:, None] * place.columns + column).astype(int)
    x, y = (x // patch).astype(int), (y // patch).astype(int)
    values = tiles[tile, np.minimum(y, grid - 1)[:, None], np.minimum(x, grid - 1)]
    return np.where((y < grid)[:, None] & (x < grid), values, np.nan)


def _first_sizes(items: Sequence[Item], numbers: Iterable[int]) -> dict[int, tuple[int, int]]:
    sizes = {}
    for number in numbers:
        with open_image(items[number].images[0]) as image:
            sizes[number] = image.size
    return sizes
