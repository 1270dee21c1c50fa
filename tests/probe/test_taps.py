"""The tapped tokens equal those of the model's own forward pass and of torch's pooling."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.sliced import sliced_config
from tests.inference import tiny
from tests.tiny import pack
from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation
from vr_jax.errors import UserError
from vr_jax.inference import user_turn
from vr_jax.model import registry
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.model.windows import to_raster
from vr_jax.probe.head import make_heads
from vr_jax.probe.taps import QUESTION, default_layers, one_tile, prompt_batch, tapped_tokens, taps_of
from vr_jax.probe.training import loss_of

CONFIG = one_tile(tiny.config())
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)


def test_an_encoder_of_slices_is_refused():
    with pytest.raises(UserError, match="the encoder 'siglip_slices' does not read"):
        one_tile(sliced_config())


def encoded(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tapped():
    """The tokens of all taps, and those of the model's own forward pass on prompts prepared from the image files."""
    model, processor = tiny.model(CONFIG), Processor(tiny.TOKENIZER, CONFIG)
    taps, _ = taps_of(CONFIG, (1, 2, 3))
    prompt = prompt_batch(processor, QUESTION)
    examples = [processor.prompt(Conversation("x", (user_turn(QUESTION, 1),), (encoded(pixels),))) for pixels in PIXELS]
    batch = pack(CONFIG, [[example] for example in examples])

    @jax.jit
    def everything(model, pixels):
        tokens = tapped_tokens(model, prompt, pixels, taps)
        levels = model.encode_images(batch)
        final, _ = model.run(levels, batch)
        return tokens, levels, final, model.embed(batch, levels), model.decoder.norm(tokens["layer 3"])

    tokens, levels, final, embedded, normed = jax.device_get(everything(model, PIXELS))
    vision = np.asarray(batch.vision_cell) >= 0
    assert (vision.sum(axis=1) == 9).all()
    return {
        "names": [tap.name for tap in taps],
        "tokens": tokens,
        "levels": levels,
        "final": final[vision].reshape(2, 9, -1),
        "embedded": embedded[vision].reshape(2, 9, -1),
        "normed": normed,
    }


@pytest.mark.slow  # Every tap of a model is compiled.
def test_names_in_the_order_of_the_forward_pass(tapped):
    assert tapped["names"] == [
        *("encoder", "compressor", "projector"),
        *("layer 1", "layer 1 + vision_remember", "layer 2", "layer 3"),
    ]
    assert tapped["tokens"].keys() == set(tapped["names"])


def test_encoder_is_the_hidden_state_that_feeds_the_projector(tapped):
    level = tapped["levels"][CONFIG.vision_feature_layer]
    np.testing.assert_array_equal(tapped["tokens"]["encoder"], level.reshape(2, 36, -1))


def test_compressor_is_the_window_mean(tapped):
    raster = np.array(to_raster(tapped["levels"][CONFIG.vision_feature_layer][:, 0])).reshape(2, 6, 6, -1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(raster).permute(0, 3, 1, 2), 3)
    np.testing.assert_allclose(tapped["tokens"]["compressor"], pooled.flatten(2).mT.numpy(), atol=1e-5, rtol=1e-5)


def test_projector_is_what_the_decoder_gets(tapped):
    np.testing.assert_allclose(tapped["tokens"]["projector"], tapped["embedded"], atol=1e-5, rtol=1e-5)


def test_the_last_layer_is_the_forward_pass_before_its_norm(tapped):
    np.testing.assert_allclose(tapped["normed"], tapped["final"], atol=2e-5)
    assert np.abs(tapped["tokens"]["layer 1"] - tapped["tokens"]["layer 1 + vision_remember"]).max() > 0.1


@pytest.mark.slow  # The gradient through every tap is compiled.
def test_no_gradient_reaches_the_model():
    model, prompt = tiny.model(CONFIG), prompt_batch(Processor(tiny.TOKENIZER, CONFIG), QUESTION)
    taps, _ = taps_of(CONFIG, (1,))
    shapes = jax.eval_shape(lambda model: tapped_tokens(model, prompt, PIXELS, taps), model)
    heads = {name: make_heads(x.shape[-1], 3, jnp.arange(1), width=8, heads=2) for name, x in shapes.items()}

    def loss(model, heads):
        tokens = tapped_tokens(model, prompt, PIXELS, taps)
        return loss_of(heads, tokens, jnp.array([0, 1]), jnp.ones(2))[0]

    frozen, trained = jax.jit(jax.grad(loss, argnums=(0, 1)))(model, heads)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert all(np.any(head.classifier.kernel[...]) for head in trained.values())


@pytest.mark.parametrize(
    ("projector", "width"),
    [("pixel_shuffle", 64), ("ldpv2", 24), ("perceiver", 16)],
)
def test_other_projectors_name_what_stands_for_the_compressor(projector, width):
    config = dataclasses.replace(
        CONFIG, projector=registry.method("projector", projector, "projector")(stride=2), refusion=None
    )
    taps, left_out = taps_of(config, (1,))
    model = abstract_model(config)
    prompt = prompt_batch(Processor(tiny.TOKENIZER, config), QUESTION)
    shapes = jax.eval_shape(lambda model: tapped_tokens(model, prompt, PIXELS, taps), model)
    assert shapes["compressor"].shape == (2, 9, width)
    assert shapes["projector"].shape == (2, 9, 24)
    assert left_out == {}
    assert "window" in taps[1].description or "latents" in taps[1].description


def test_a_compressor_that_does_not_exist_is_left_out_by_name():
    config = dataclasses.replace(CONFIG, projector=MlpConfig(), refusion=None)
    taps, left_out = taps_of(config, (1,))
    assert [tap.name for tap in taps] == ["encoder", "projector", "layer 1"]
    assert left_out == {"compressor": "the projector 'mlp' does not compress, so this tap would repeat the encoder"}


def test_layers():
    assert default_layers(24) == (1, 4, 8, 12, 16, 20, 24)
    assert default_layers(3) == (1, 3)
    taps, left_out = taps_of(CONFIG, (1,))
    assert taps[-1].description.endswith("without final norm, before vision_remember acts")
    assert left_out == {"layer 1 + vision_remember": "it acts after the last chosen layer"}
    for layers in ((), (0,), (4,), (2, 1)):
        with pytest.raises(UserError, match=r"expected increasing numbers from 1 to 3"):
            taps_of(CONFIG, layers)
