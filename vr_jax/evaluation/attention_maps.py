"""Heat maps of the local cross-attention of Vision Remember over the images of a benchmark's items.

There is one map for each insertion of the re-fusion block. A map shows how each vision token distributes its attention
over the patches of its own window, where 1 is uniform attention. It compares patches within a window and not windows
with each other. The size of a token's update says how much the token re-read at all; the note of a map gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from vr_jax.data import tiling
from vr_jax.data.images import open_image
from vr_jax.data.layouts import Placement
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
from vr_jax.model.windows import adaptive_windows, to_raster
from vr_jax.sharding import constrain

# The resolution of a map along its longer side. A patch has several pixels, because edge patches can be partly padding.
PIXELS_PER_PATCH = 4
MIN_SIDE = 96  # The smallest longer side of a map, in pixels.


def maps_of_items(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> list[tuple[HeatMap, ...]]:
    """Computes the heat maps over the first image of each item.

    All processes of a run call it together, under the mesh of the evaluation. Each prepares its share of every batch.

    Args:
        generator: The model.
        processor: The processor of the model.
        benchmark: The benchmark of the items.
        items: The items.
        batch_size: The number of items in a batch, over all processes.
        progress: Whether the first process shows a progress bar on standard error.

    Returns:
        The maps of each item, one for each insertion, on every process. An item that has no images or cannot be asked
        has no maps.

    Raises:
        UserError: The model has no local cross-attention.
    """
    config = generator.model.config
    if refusal := reread_refusal(config):
        raise UserError(f"heat maps are not possible: {refusal}")
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
    """Computes the attention weights of one batch of prompts.

    Args:
        generator: The model.
        prompts: The prompts of this process by number; see `Generator.generate_rows`.
        rows: The number of rows of this process.

    Returns:
        For the prompts of all processes, by number, one `Reread` for each insertion. It holds the weights (T, C, S) and
        the updates (T, C) of T tiles with C cells of S patches.

    Raises:
        PromptTooLong: A prompt exceeds the largest bucket.
        ConfigError: The model has no local cross-attention.
    """
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
    found: Sequence[Reread],
    size: tuple[int, int],
    config: VlmConfig,
    *,
    images: int = 1,
    base: bool = False,
    which: str | None = None,
) -> tuple[HeatMap, ...]:
    """Draws the attention weights of a prompt over its first image.

    Args:
        found: The weights at each insertion; see `rereads`. Those of a later image begin with its tiles (`of_image`).
        size: The width and height of the image in pixels.
        config: The config of the model.
        images: The number of images of the prompt.
        base: Whether the base tile or the overview is shown instead of the grid of tiles.
        which: What the notes say first. By default they say that the image is the first one where there are several.

    Returns:
        One map for each insertion, or none if no vision token lies on the image.
    """
    assert config.refusion is not None
    seen = placed_tiles(found, size, config, alone=images == 1, base=base)
    if seen is None:
        return ()
    place, tiles = seen
    if which is None:
        which = f"the first of {images} images; " if images > 1 else ""
    extent = tiling.layout(size, config, alone=images == 1).extent if config.encoder.layout == "raster" else None
    maps = []
    for layer, one in zip(config.refusion.insert_after, found, strict=True):
        weights = np.asarray(one.weights)
        if extent is None:
            relative, largest = relative_weights(weights), weights[tiles].max(initial=0) * weights.shape[-1]
        else:
            relative = slice_weights(weights[: len(extent)], extent)
            largest = np.nanmax(relative[tiles])
        ratios = on_image(relative, place, size, config)
        update = one.update[tiles][one.weights[tiles].any(axis=-1)]
        note = (
            f"{which}largest weight {largest:.2f} times uniform; "
            f"median update {np.median(update):.1%} of a token's state, largest {update.max():.1%}"
        )
        maps.append(HeatMap(f"after layer {layer}", heat_png(ratios), note))
    return tuple(maps)


def placed_tiles(
    found: Sequence[Reread], size: tuple[int, int], config: VlmConfig, *, alone: bool = True, base: bool = False
) -> tuple[Placement, slice] | None:
    """Returns the tiles that show an image, and where they lie on it.

    Args:
        found: The weights at each insertion, of the tiles of this image and those after them.
        size: The width and height of the image in pixels.
        config: The config of the model.
        alone: Whether the image is the only one of its prompt.
        base: Whether the base tile or the overview is meant instead of the grid of tiles.

    Returns:
        The placement and the tiles of the grid; those of the base tile if the image is so narrow that unpadding leaves
        no row of its grid; or None if no vision token lies on the image.
    """
    for choice in dict.fromkeys((base, True)):
        place = tiling.placement(size, config, alone=alone, base=choice)
        tiles = slice(place.first, place.first + place.columns * place.rows)
        if any(one.weights[tiles].any() for one in found):
            return (place, tiles) if all(one.weights[tiles].any() for one in found) else None
    return None


def of_image(
    found: Sequence[Reread], sizes: Sequence[tuple[int, int]], number: int, config: VlmConfig
) -> tuple[Reread, ...]:
    """Returns the part of a prompt's weights that belongs to one of its images.

    Args:
        found: The weights at each insertion; see `rereads`.
        sizes: The width and height of each image of the prompt in pixels.
        number: The number of the image, from 0.
        config: The config of the model.
    """
    counts = [tiling.layout(size, config, alone=len(sizes) == 1).tiles for size in sizes]
    tiles = slice(sum(counts[:number]), sum(counts[: number + 1]))
    return tuple(jax.tree.map(lambda array: array[tiles], one) for one in found)


def relative_weights(weights: Float[np.ndarray, "T C S"]) -> Float[np.ndarray, "T G G"]:
    """Arranges the weights of each tile as a raster of its patches.

    Args:
        weights: The attention weights of T tiles with C cells of S patches.

    Returns:
        The weights divided by the uniform weight 1 / S, with G x G patches in a tile. Patches of cells without a vision
        token are NaN.
    """
    tiles, cells, patches = weights.shape
    relative = np.where(weights.any(axis=-1, keepdims=True), weights * patches, np.nan)
    grid = round((cells * patches) ** 0.5)
    return np.asarray(to_raster(relative[..., None])).reshape(tiles, grid, grid)  # type: ignore[arg-type]


def slice_weights(weights: Float[np.ndarray, "T C S"], extent: Int[np.ndarray, "T 2"]) -> Float[np.ndarray, "T H W"]:
    """Arranges the weights of each slice as a raster of its patches.

    The windows of the cells have sizes of their own and may overlap. A patch in several windows gets the mean of their
    weights, each relative to the uniform weight of its window.

    Args:
        weights: The attention weights of T slices with C cells of at most S patches.
        extent: The rows and columns of patches of each slice.

    Returns:
        The relative weights; NaN beyond a slice's patches, up to the most rows and columns of any slice.
    """
    tiles, cells, slots = weights.shape
    patches, valid = (np.asarray(one) for one in adaptive_windows(jnp.asarray(extent), math.isqrt(cells), slots))
    rows, columns = extent.max(axis=0)
    result = np.full((tiles, rows, columns), np.nan)
    for tile, (height, width) in enumerate(extent.tolist()):
        inside = valid[tile] & weights[tile].any(axis=-1, keepdims=True)
        relative = weights[tile] * valid[tile].sum(axis=-1, keepdims=True)
        total, count = (
            np.bincount(patches[tile][inside], values[inside], minlength=height * width)
            for values in (relative, np.ones_like(relative))
        )
        with np.errstate(invalid="ignore"):
            result[tile, :height, :width] = (total / count).reshape(height, width)
    return result


def on_image(
    tiles: Float[np.ndarray, "T H W"], place: Placement, size: tuple[int, int], config: VlmConfig
) -> Float[np.ndarray, "h w"]:
    """Places the patches of the tiles on the image, with nearest-neighbour sampling, and crops the padding.

    Args:
        tiles: The value of each patch, for T tiles with H x W patches or fewer.
        place: The position of the tiles on the image.
        size: The width and height of the image in pixels.
        config: The config of the model.

    Returns:
        An array with about the aspect ratio of the image. It is NaN where no patch lies, which is so outside a crop,
        and at the right and bottom edge of a tile whose size is not a multiple of the patch size.
    """
    patch, (rows, columns) = config.encoder.patch_size, tiles.shape[1:]
    wide, high = place.tile or (config.image.tile_size, config.image.tile_size)
    longest = min(max(place.width, place.height), max(wide * place.columns, high * place.rows))
    longer = max(MIN_SIDE, round(PIXELS_PER_PATCH * longest / patch))
    width, height = (max(1, round(longer * extent / max(size))) for extent in size)
    column, x = np.divmod(place.left + (np.arange(width) + 0.5) * place.width / width, wide)
    row, y = np.divmod(place.top + (np.arange(height) + 0.5) * place.height / height, high)
    seen_x, seen_y = (column >= 0) & (column < place.columns), (row >= 0) & (row < place.rows)
    column, row = np.clip(column, 0, place.columns - 1), np.clip(row, 0, place.rows - 1)
    tile = (place.first + row[:, None] * place.columns + column).astype(int)
    x, y = (x // patch).astype(int), (y // patch).astype(int)
    values = tiles[tile, np.minimum(y, rows - 1)[:, None], np.minimum(x, columns - 1)]
    return np.where((seen_y & (y < rows))[:, None] & seen_x & (x < columns), values, np.nan)


def _first_sizes(items: Sequence[Item], numbers: Iterable[int]) -> dict[int, tuple[int, int]]:
    sizes = {}
    for number in numbers:
        with open_image(items[number].images[0]) as image:
            sizes[number] = image.size
    return sizes
