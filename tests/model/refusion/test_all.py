"""The promises of every re-fusion block.

Tiles and samples stay apart, other states are untouched, and decoding with a cache equals recomputation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    SampleImage,
    Text,
    example,
    pack,
    params_of,
    quick,
    random_model,
    tiny_config,
    tiny_decoder,
    tiny_refusion,
)
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.vlm import VisionLanguageModel

# The self-attention joins the tiles of an image, so it is left out here and tested in test_vision_remember.py.
_APART = {"insert_after": (1, 2), "levels": (1, 3), "self_attention": False}
REFUSION = {
    "global": tiny_refusion(interaction="global", **_APART),
    "deformable": tiny_refusion(interaction="deformable", **_APART),
    "deepstack": DeepStackConfig(insert_after=(1, 2), levels=(1, 3)),
    "deepstack, patch merger": DeepStackConfig(insert_after=(1, 2), levels=(1, 3), merger="qwen3_vl"),
    "sva": SvaConfig(insert_after=(1, 2), levels=(3,), width=16, heads=4, depth=2),
}

# These shift all keys alike, which the softmax ignores.
SHIFTS = ("cross_attn.k.bias", "cross_attn.ln_k.bias")


def config_of(name: str):
    return tiny_config(refusion=REFUSION[name], decoder=tiny_decoder(num_layers=3))


@pytest.fixture(scope="module", params=quick(REFUSION, "deformable"))
def model(request) -> VisionLanguageModel:
    return random_model(config_of(request.param))


def samples(config):
    """A sample with cropped tiles, one of text only, and one with two images."""
    return [
        example(config, Text(3), SampleImage(3, crop=1), Text(4, text_token=True), Text(2), seed=1),
        example(config, Text(6, text_token=True), Text(2), seed=2),
        example(config, Text(2), SampleImage(1), Text(1), SampleImage(2), Text(3, text_token=True), Text(2), seed=3),
    ]


def test_each_tile_changes_its_own_tokens_only_and_every_parameter_trains(model):
    """A change of one tile leaves the rest of a packed row, and the other row, exactly as they were."""
    config = model.config
    one, two, three = samples(config)
    batch = pack(config, [[one, two, three], [two]], tokens=80, tiles=7)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 80, config.decoder.hidden_size)), jnp.float32)
    shape = (*batch.tile_image.shape, config.cells_per_tile, config.projector.stride**2, config.encoder.hidden_size)
    levels = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in config.refusion.levels)

    @jax.jit
    def look(refusion, levels, hidden, batch):
        def run(refusion, levels):
            vision = VisionContext.of(batch, refusion.prepare(levels), config.cells_per_tile)
            inputs = DecoderInputs(hidden=hidden, positions=batch.positions, segment_ids=batch.segment_ids)
            return jnp.stack([block(inputs, vision).hidden for block in refusion.blocks])

        def perturbed(tile):
            hit = (jnp.arange(shape[1]) == tile)[None, :, None, None, None]
            return run(refusion, tuple(jnp.where(hit, level[..., ::-1] + 1, level) for level in levels))

        # One loop over all tiles, in which -1 is none, gives equal bits for equal inputs.
        states = jax.lax.map(perturbed, jnp.arange(-1, shape[1]))
        gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), argnums=(0, 1))(refusion, levels)
        return states, gradients

    (before, *changed), (gradients, encoder) = look(model.refusion, levels, hidden, batch)
    cell = np.asarray(batch.vision_cell)
    for block in np.asarray(before):
        np.testing.assert_array_equal((block != hidden).any(axis=-1), cell >= 0)
    for tile, states in enumerate(changed):
        expected = (cell >= 0) & (cell // config.cells_per_tile == tile)
        for block, reference in zip(np.asarray(states), np.asarray(before), strict=True):
            np.testing.assert_array_equal((block != reference).any(axis=-1), expected)
    for path, gradient in params_of(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-5 or path.endswith(SHIFTS), path
    assert not any(level.any() for level in encoder), "the encoder is frozen"


@pytest.mark.slow  # Three programs of each block; test_packing.py and test_generate.py do so for Vision Remember.
def test_packing_and_decoding(model):
    """Rows of one sample each, all samples in one row, and decoding token by token give the same states."""
    config, steps = model.config, 2
    alone = samples(config)
    length = max(len(sample.tokens) for sample in alone)
    whole = pack(config, [[sample] for sample in alone], tokens=length, pad_side="left")
    packed = pack(config, [alone], tokens=sum(len(sample.tokens) for sample in alone) + 3)

    @jax.jit
    def run(model, whole, packed):
        prompt = dataclasses.replace(
            whole,
            **{
                name: getattr(whole, name)[:, :-steps]
                for name in ("tokens", "positions", "segment_ids", "loss_mask", "text_token_mask", "vision_cell")
            },
        )
        prefilled, cache = model(prompt, model.init_cache(len(alone), length))

        def step(cache, at):
            tokens, positions = (jax.lax.dynamic_slice_in_dim(x, at, 1, 1) for x in (whole.tokens, whole.positions))
            state, cache = model.decode(tokens, positions, cache)
            return cache, state[:, 0]

        _, decoded = jax.lax.scan(step, cache, jnp.arange(length - steps, length))
        cached = jnp.concatenate([prefilled, decoded.swapaxes(0, 1)], axis=1)
        return model(whole)[0], cached, model(packed)[0]

    expected, cached, in_one_row = (np.asarray(x) for x in run(model, whole, packed))
    real = np.asarray(whole.segment_ids) > 0
    np.testing.assert_allclose(cached[real], expected[real], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(
        in_one_row[np.asarray(packed.segment_ids) > 0],
        np.concatenate([*expected])[real.reshape(-1)],
        atol=1e-5,
        rtol=1e-5,
    )
