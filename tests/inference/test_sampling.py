"""Sampling against the exact distribution, enumerated in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import binom
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from vr_jax.errors import ConfigError
from vr_jax.inference import Sampling
from vr_jax.inference.sampling import nucleus, sample

LOGITS = np.array(
    [
        [2.0, -1.0, 0.5, 3.0, 0.0, -4.0, 1.5],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [9.0, -9.0, 0.0, 0.1, 0.2, 0.3, -0.5],
    ],
    np.float32,
)
DRAWS = 20000


def distribution(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probability of every token, by walking through them in descending order."""
    scaled = np.exp(logits.astype(np.float64) / temperature)
    probability = scaled / scaled.sum()
    kept = np.zeros_like(probability)
    before = 0.0
    for token in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if before >= top_p:
            break
        kept[token] = probability[token]
        before += probability[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.55, 1e-6])
def test_frequencies_match_the_enumeration(temperature, top_p):
    draw = jax.jit(lambda keys: sample(LOGITS, keys, jnp.float32(temperature), jnp.float32(top_p)))
    keys = jax.random.split(jax.random.key(7), (DRAWS, len(LOGITS)))
    tokens = np.asarray(jax.vmap(draw)(keys))
    for row, logits in enumerate(LOGITS):
        expected = distribution(logits, temperature, top_p)
        counts = np.bincount(tokens[:, row], minlength=len(logits))
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected)), "a token outside the nucleus"
        # Exact binomial tails: chance of a count at least that low, and at least that high.
        tails = np.minimum(binom.cdf(counts, DRAWS, expected), binom.sf(counts - 1, DRAWS, expected))
        assert tails.min() > 1e-5, (counts / DRAWS, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95])
def test_nucleus_is_that_of_transformers(temperature, top_p):
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 3
    ranked, order = nucleus(logits / jnp.float32(temperature), jnp.float32(top_p))
    found = np.full_like(logits, -np.inf)
    np.put_along_axis(found, np.asarray(order), np.asarray(ranked), axis=1)
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))).numpy()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    inside = np.isfinite(found)
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-6)


def test_greedy_is_argmax_and_the_first_of_equals():
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    np.testing.assert_array_equal(jax.jit(sample)(LOGITS, keys, None, None), [3, 0, 0])


def test_a_long_tail_is_whole_at_top_p_one():
    """Rounding of the cumulative sum over a real vocabulary must not drop tokens."""
    logits = np.random.default_rng(0).normal(size=(1, 152_000)).astype(np.float32)
    assert np.isfinite(nucleus(logits, jnp.float32(1))[0]).all()


def test_rows_draw_independently():
    logits = np.zeros((2, 1000), np.float32)
    keys = jax.random.split(jax.random.key(3), 2)
    both = sample(logits, keys, jnp.float32(1), jnp.float32(1))
    assert both[0] != both[1]
    assert sample(logits[1:], keys[1:], jnp.float32(1), jnp.float32(1))[0] == both[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
