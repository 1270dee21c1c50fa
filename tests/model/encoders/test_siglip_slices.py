"""MiniCPM-V's SigLIP: resized positions against JAX's own, and what must not matter. Its states: tests/golden."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import minicpm
from tests.minicpm import tiny_config
from tests.tiny import random_model
from tests.training.test_flops import dot_flops
from vr_jax.errors import ConfigError
from vr_jax.model.batch import TilePlaces
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig, resize_weights
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

# Enlarged, shrunk, kept, enlarged on one axis and shrunk on the other, thin.
GRIDS = [(8, 8), (3, 4), (5, 5), (2, 16), (9, 4), (1, 30), (6, 10)]


@functools.cache
def model() -> VisionLanguageModel:
    return random_model(tiny_config())


def test_positions_are_those_of_jax_image_resize():
    """Values and gradients. Both compute in float32; the sum of the weights alone rounds by some 1e-7."""
    encoder, extent = model().encoder, np.array([*GRIDS, (0, 0)], np.int32)
    side, patches = encoder.config.position_grid, encoder.config.grid**2
    assert side == 5
    width = encoder.config.hidden_size
    slope = np.random.default_rng(0).normal(size=(len(extent), patches, width)).astype(np.float32)

    def reference(learned):
        grids = [
            jax.image.resize(learned.reshape(side, side, width), (*grid, width), "cubic", antialias=True)
            for grid in GRIDS
        ]
        return [grid.reshape(-1, width) for grid in grids]

    def weighed(grids):
        return sum(jnp.sum(x * slope[k, : len(x)]) for k, x in enumerate(grids)), grids

    def own_sum(encoder):
        found = encoder.positions(extent)
        return jnp.sum(found * slope), found

    learned = encoder.position_embedding[...]
    found, gradient = jax.jit(jax.grad(own_sum, has_aux=True))(encoder)[::-1]
    expected_gradient, grids = jax.jit(jax.grad(lambda x: weighed(reference(x)), has_aux=True))(learned)
    found = np.asarray(found)
    for k, expected in enumerate(grids):
        np.testing.assert_allclose(found[k, : len(expected)], expected, atol=2e-6, rtol=1e-6)
        assert not found[k, len(expected) :].any()
    assert not found[-1].any()
    np.testing.assert_allclose(gradient.position_embedding[...], expected_gradient, atol=1e-4, rtol=1e-5)


def test_weights_of_a_grid_that_is_kept_are_one():
    size = np.full((1, 1), 7, np.int32)
    np.testing.assert_array_equal(resize_weights(np.arange(7, dtype=np.int32)[None], size, 7)[0], np.eye(7))


@functools.cache
def states():
    return jax.jit(lambda encoder, pixels, places: encoder(pixels, (0, 1, 3, 4, 5), places))


def slots(seed: int, *extents: tuple[int, int]) -> tuple[np.ndarray, TilePlaces]:
    """Slots full of noise."""
    size = model().config.encoder.image_size
    pixels = np.random.default_rng(seed).integers(0, 256, (1, len(extents), size, size, 3), dtype=np.uint8)
    return pixels, TilePlaces(
        image=np.ones((1, len(extents)), np.int32), extent=np.array([extents], np.int32), origin=None
    )


def test_what_lies_beyond_a_slice_does_not_matter():
    pixels, places = slots(0, (5, 7), (3, 3), (0, 0))
    other, _ = slots(1, (5, 7), (3, 3), (0, 0))
    piece = np.random.default_rng(2).integers(0, 256, (5 * 14, 7 * 14, 3), dtype=np.uint8)
    side = model().config.encoder.grid
    own = minicpm.canvas(np.ones((5 * 14, 7 * 14, 3), np.uint8), side) == 1
    for x in (pixels, other):
        x[0, 0] = np.where(own, minicpm.canvas(piece, side), x[0, 0])
    assert (pixels[0, 0] != other[0, 0]).any()
    found = [states()(model().encoder, x, places) for x in (pixels, other)]
    for one, two in zip(*found, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one[0, 0, 0, :35], two[0, 0, 0, :35])
        assert (one[0, 0, 0, 35:] != two[0, 0, 0, 35:]).any()


def test_the_last_level_alone_is_normalised():
    pixels, places = slots(0, (5, 7))
    encoder = model().encoder
    *_, raw, normed = states()(encoder, pixels, places)
    np.testing.assert_allclose(encoder.post_norm(raw), normed, atol=1e-6)
    assert np.abs(raw - normed).max() > 0.1


def test_activations_are_of_the_type_of_the_model():
    config = dataclasses.replace(tiny_config(), dtype="bfloat16")
    half = abstract_model(config)
    pixels, places = slots(0, (5, 7), (3, 3))

    def run(half):
        states = half.encoder(pixels, (0, 4, 5), places)
        return *states, half.projector(states[-1], places=places)

    assert {x.dtype for x in jax.eval_shape(run, half)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(lambda half: half.encoder.positions(places.extent[0]), half).dtype == jnp.float32


def test_refusals():
    encoder = model().encoder
    pixels, places = slots(0, (5, 7))
    with pytest.raises(ValueError, match=r"hidden states \[2\] are not stage bounds"):
        encoder(pixels, (2,), places)
    with pytest.raises(ValueError, match="needs the places of the tiles"):
        encoder(pixels, (1,))
    with pytest.raises(NotImplementedError, match="no pruner reads"):
        encoder.received_attention(jnp.zeros((1, 1, 4, 16)))
    with pytest.raises(ConfigError, match="hidden_size = 10 is not divisible by num_heads = 4"):
        SiglipSlicesConfig(hidden_size=10, num_heads=4)
    with pytest.raises(ConfigError, match="image_size = 450 is not divisible by patch_size = 14"):
        SiglipSlicesConfig(image_size=450)
    with pytest.raises(ConfigError, match=r"hidden state 6 does not exist, the encoder has 0\.\.5"):
        dataclasses.replace(tiny_config(), vision_feature_layer=6)


def test_flops_are_those_of_a_full_slot():
    """The products of the patch embedding and the layers; those that resize the positions are not counted."""
    encoder, (pixels, places) = model().config.encoder, slots(0, (5, 7))

    def products(run) -> int:
        return dot_flops(jax.make_jaxpr(run)(model().encoder).jaxpr)

    whole, resizing = products(lambda e: e(pixels, (4,), places)), products(lambda e: e.positions(places.extent[0]))
    assert whole - resizing == encoder.flops_per_tile(4) == encoder.flops_per_tile(5)
