"""The splash kernel against the reference in float64: in Pallas' interpreter, and on a TPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention.cases import Case, check
from tests.noise import assert_within_noise, float64
from vr_jax.kernels.attention import reference, splash
from vr_jax.sharding import make_mesh


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes blocks so small that a row takes two of them."""
    monkeypatch.setattr(splash, "BLOCK", 128)


@pytest.mark.parametrize(
    ("causal", "extra_keys"), [(True, 0), pytest.param(False, 0, marks=pytest.mark.slow), (False, 3)]
)
def test_values_and_gradients(causal: bool, extra_keys: int):
    check(splash.attention, Case(causal, extra_keys))


@pytest.mark.tpu
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_on_a_tpu(causal: bool):
    check(splash.attention, Case(causal, width=128, dtype="bfloat16"))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 2, 4)])
def test_a_mesh_divides_rows_and_heads(mesh: tuple[int, int, int]):
    """Pallas calls are not partitioned by XLA; on four devices along `tensor`, two key heads are repeated."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(8, 137, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(rng.integers(0, 3, (8, 137)))
    masks = {"query_segments": segments, "key_segments": segments, "causal": False}
    plain = jax.jit(lambda *arrays: reference.attention(*arrays, **masks))
    with float64():
        exact = np.asarray(plain(*(np.asarray(x, np.float64) for x in arrays)))
    with jax.set_mesh(make_mesh(*mesh)):
        found = jax.jit(lambda *arrays: splash.attention(*arrays, **masks))(*arrays)
    assert_within_noise(found, exact, plain(*arrays))
