"""Attention over a cache against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention.cases import Case
from tests.noise import assert_within_noise, float64
from vr_jax.kernels.attention import cached_attention, reference


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_new_token_attends_to_the_valid_slots_of_its_cache(platform: str, monkeypatch):
    """Both forms of the first product, the one for CPUs and the one for accelerators."""
    monkeypatch.setattr("vr_jax.kernels.attention.cached.platform", lambda: platform)
    case = Case()
    arrays = case.arrays()
    query, key, value = arrays["arrays"]
    query, segments = query[:, :1], arrays["segments"][1]
    found = jax.jit(cached_attention)(query, key.swapaxes(1, 2), value.swapaxes(1, 2), segments == 2)

    @jax.jit
    def run(*qkv: jax.Array) -> jax.Array:
        return reference.attention(*qkv, query_segments=jnp.full((2, 1), 2), key_segments=segments, causal=False)

    with float64():
        exact = np.asarray(run(*(np.asarray(x, np.float64) for x in (query, key, value))))
    assert_within_noise(found, exact, run(query, key, value))
