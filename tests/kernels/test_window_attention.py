"""Windowed cross-attention against float64 loops: own and shared keys, hidden keys, empty windows, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.kernels.window_attention import window_attention

W, S, H, D, DV = 5, 4, 3, 8, 6


def loop(query, key, value, valid, scale):
    out = np.zeros((W, H, value.shape[-1]))
    for w, h in np.ndindex(W, H):
        seen = valid[w]
        if not seen.any():
            continue
        k, v = (x[w, seen, h if x.shape[2] == H else 0] for x in (key, value))
        logits = k @ query[w, h] * scale
        weights = np.exp(logits - logits.max())
        out[w, h] = weights / weights.sum() @ v
    return out


@pytest.mark.parametrize("heads_of_keys", [H, 1])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_matches_the_loop(heads_of_keys: int, hidden: bool, scale: float | None):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=shape) for shape in ((W, H, D), (W, S, heads_of_keys, D), (W, S, heads_of_keys, DV))
    )
    valid = rng.random((W, S)) < 0.5
    valid[0], valid[1] = False, True  # an empty window and a full one
    seen = valid if hidden else np.ones((W, S), bool)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value))

    def attend(*arrays):
        return window_attention(*arrays, jnp.asarray(valid) if hidden else None, scale=scale)

    expected = loop(query, key, value, seen, D**-0.5 if scale is None else scale)
    np.testing.assert_allclose(attend(*arrays), expected, atol=2e-6)

    gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(*arrays)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient[1]).any()
        if hidden:
            assert not np.asarray(gradient[0]).any()
    for gradient in gradients[1:]:  # keys and values that nobody sees
        assert not np.asarray(gradient)[~seen].any()


def test_softmax_is_float32():
    """Logits around 160 lose their differences in bfloat16 (steps of 1)."""
    query = jnp.full((1, 1, 1), 1.0, jnp.bfloat16)
    key = jnp.asarray([[[[16.0]], [[16.125]]]], jnp.bfloat16)
    value = jnp.asarray([[[[0.0]], [[1.0]]]], jnp.bfloat16)
    found = float(window_attention(query, key, value, scale=10.0)[0, 0, 0])
    assert found == pytest.approx(1 / (1 + np.exp(-1.25)), abs=4e-3)


def test_unknown_backend():
    x = jnp.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"'cuda': expected one of \['auto', 'reference'"):
        window_attention(x[0], x, x, backend="cuda")
