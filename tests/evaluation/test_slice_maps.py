"""Heat maps over images that are cut into slices: the place of each patch, and windows that overlap."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tests.data.sliced import unpacked
from tests.inference import tiny
from tests.minicpm import model_config
from tests.tiny import random_model
from vr_jax.data import slices, tiling
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.evaluation import attention_maps as maps
from vr_jax.inference import Buckets, Generator
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.refusion.vision_remember import Reread, VisionRememberConfig
from vr_jax.model.windows import adaptive_windows

DECODER = TransformerConfig(
    vocab_size=len(tiny.TOKENIZER), hidden_size=24, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=2
)
VISION = {"img_size": 84, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
PLAIN = model_config(
    VISION,
    DECODER,
    blocks=2,
    queries=3,
    heads=2,
    slot=9,
    refusion=VisionRememberConfig(insert_after=(1,), levels=(1, 2), cross_heads=2),
)
# Slices have about 7 x 7 patches, and an image is cut into four at most.
CONFIG = dataclasses.replace(PLAIN, image=dataclasses.replace(PLAIN.image, slice_size=98, max_slices=4))
SIZES = {"not cut": (90, 60), "two pieces": (150, 100), "four pieces": (300, 260), "wide": (900, 170)}


def patch_means(image: Image.Image) -> np.ndarray:
    """The mean of the red channel of each patch of the slices, NaN beyond a slice's patches."""
    extent = tiling.layout(image.size, CONFIG).extent
    result = np.full((len(extent), *extent.max(axis=0)), np.nan)
    for number, (slot, (rows, columns)) in enumerate(zip(tiling.tiles(image, CONFIG), extent.tolist(), strict=True)):
        pixels = unpacked(slot, (rows, columns), 14)[..., 0].astype(np.float64)
        result[number, :rows, :columns] = pixels.reshape(rows, 14, columns, 14).mean(axis=(1, 3))
    return result


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("base", [False, True])
def test_patches_lie_where_the_image_shows_them(name, base):
    """The grey of the image grows from left to right, then from top to bottom, and so does that of the map."""
    size = SIZES[name]
    place = tiling.placement(size, CONFIG, base=base)
    assert (place.columns * place.rows == 1) == (base or name == "not cut")
    for axis, side in ((1, place.width), (0, place.height)):
        ramp = np.expand_dims(40 + 200 * (np.arange(size[1 - axis]) + 0.5) / size[1 - axis], 1 - axis)
        grey = np.broadcast_to(ramp.round().astype(np.uint8), size[::-1])
        found = maps.on_image(patch_means(Image.fromarray(np.repeat(grey[..., None], 3, axis=2))), place, size, CONFIG)
        assert not np.isnan(found).any()
        assert max(found.shape) >= maps.MIN_SIDE
        count = found.shape[axis]
        expected = np.expand_dims(40 + 200 * (np.arange(count) + 0.5) / count, 1 - axis)
        assert np.abs(found - expected).max() <= 200 * 14 / side + 2


def test_weights_of_overlapping_windows_are_averaged():
    """Three windows of two patches on four columns and of one patch on two rows, by hand.

    The windows of the columns are 0..1, 1..2 and 2..3, those of the rows are 0, 0..1 and 1.
    """
    extent = np.asarray([[2, 4]])
    weights = np.zeros((1, 9, 4), np.float32)
    weights[0, 0, :2] = 0.75, 0.25  # row 0, columns 0 and 1
    weights[0, 1, :2] = 1.0, 0.0  # row 0, columns 1 and 2
    weights[0, 4, :4] = 0.4, 0.1, 0.2, 0.3  # rows 0 and 1, columns 1 and 2
    found = maps.slice_weights(weights, extent)
    expected = [[1.5, (0.5 + 2.0 + 1.6) / 3, (0.0 + 0.4) / 2, np.nan], [np.nan, 0.8, 1.2, np.nan]]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_uniform_weights_are_one_everywhere():
    """In windows of every size, with the slots that hold no patch left out."""
    size = SIZES["wide"]
    extent = np.array(tiling.layout(size, CONFIG).extent)
    valid = np.asarray(adaptive_windows(extent, 3, CONFIG.window_slots)[1])
    weights = (valid / valid.sum(axis=-1, keepdims=True)).astype(np.float32)
    weights = np.concatenate([weights, np.zeros_like(weights[:1])])  # an unused slot of the batch
    update = np.full(weights.shape[:2], 0.5, np.float32)
    (found,) = maps.heat_maps([Reread(weights=weights, update=update)], size, CONFIG)
    assert found.note == "largest weight 1.00 times uniform; median update 50.0% of a token's state, largest 50.0%"
    relative = maps.slice_weights(weights[:-1], extent)
    np.testing.assert_allclose(relative[0, : extent[0, 0], : extent[0, 1]], 1, rtol=1e-6)


@pytest.mark.slow  # It compiles a prefill.
def test_a_prompt_has_its_maps():
    """From an image to a map: the weights of the model lie on the slices of the image."""
    config = dataclasses.replace(CONFIG, template="qwen_1_5")
    processor = Processor(tiny.TOKENIZER, config)
    # The demo's tokenizer has no markers; those of ChatML stand in for them.
    object.__setattr__(processor.encoder, "markers", dict.fromkeys(slices.Marker, processor.encoder.pad_id))
    prompt = processor.prompt(Conversation("c", (Turn("user", IMAGE, "Which?"),), (tiny.png(150, 100),)))
    generator = Generator(random_model(config), tiny.TOKENIZER, Buckets(tokens=(96,), tiles=(4,)))
    found = maps.rereads(generator, {0: prompt}, rows=1)[0]
    extent = prompt.tile_extent
    relative = maps.slice_weights(np.asarray(found[0].weights)[: len(extent)], extent)
    for values, (rows, columns) in zip(relative, extent.tolist(), strict=True):
        assert not np.isnan(values[:rows, :columns]).any()
    (shown,) = maps.heat_maps(found, (150, 100), config)
    width, height = Image.open(io.BytesIO(shown.png)).size
    assert abs(width / height - 1.5) < 0.05
