"""The reference against a loop in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention.cases import Case
from tests.noise import float64
from vr_jax.kernels.attention import reference


def loop(query, key, value, query_segments, key_segments, causal):
    """Attends query by query and head by head."""
    out = np.zeros(query.shape)
    repeat = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(query.shape[:3]):
        visible = key_segments[b] == query_segments[b, i]
        if causal:
            visible &= np.arange(len(visible)) <= i
        logits = key[b, visible, h // repeat] @ query[b, i, h] / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ value[b, visible, h // repeat]
    return out


@pytest.mark.parametrize(("causal", "extra_keys"), [(True, 0), (False, 0), (False, 3)])
def test_it_equals_the_loop(causal: bool, extra_keys: int):
    case = Case(causal, extra_keys)
    with float64():
        arrays = case.arrays()
        qkv = [np.asarray(x, np.float64) for x in arrays["arrays"]]
        query_segments, key_segments = arrays["segments"]
        found = reference.attention(
            *map(jnp.asarray, qkv), query_segments=query_segments, key_segments=key_segments, causal=causal
        )
        assert found.dtype == np.float64
        # The noise of float64 is about 1e-15 here.
        np.testing.assert_allclose(found, loop(*qkv, *map(np.asarray, arrays["segments"]), causal), rtol=0, atol=1e-13)


def test_without_segments_every_query_attends_to_every_key():
    with float64():
        qkv = [np.asarray(x, np.float64) for x in Case().arrays()["arrays"]]
        one = np.ones((2, 137), int)
        found = reference.attention(*map(jnp.asarray, qkv), query_segments=None, key_segments=None, causal=False)
        np.testing.assert_allclose(found, loop(*qkv, one, one, causal=False), rtol=0, atol=1e-13)
