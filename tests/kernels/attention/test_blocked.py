"""Attention in blocks against the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention.cases import Case, check, without_masks
from tests.noise import assert_within_noise
from vr_jax.kernels.attention import blocked


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes blocks so small that some share segments and others do not."""
    monkeypatch.setattr(blocked, "KEY_BLOCK", 32)
    monkeypatch.setattr(blocked, "QUERY_ROWS", 40)


@pytest.mark.parametrize(
    ("causal", "extra_keys"), [(True, 0), pytest.param(False, 0, marks=pytest.mark.slow), (False, 3)]
)
def test_values_and_gradients(causal: bool, extra_keys: int):
    check(blocked.attention, Case(causal, extra_keys))


def test_rows_without_segments():
    """The encoder's tiles have no segments; padding of the last block is masked."""
    arrays, exact, plain = without_masks()
    attend = functools.partial(blocked.attention, query_segments=None, key_segments=None, causal=False)
    assert_within_noise(jax.jit(attend)(*arrays), exact, plain)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_share_no_segment_are_skipped(monkeypatch, causal: bool):
    """Of ten blocks of queries and five blocks of keys, only those are computed that may attend to each other."""
    calls = []
    logits = blocked.jnp.einsum

    def counted(subscripts, *operands, **options):
        if subscripts == "rk,nk->rn":
            jax.debug.callback(lambda _: calls.append(1), operands[0][0, 0])
        return logits(subscripts, *operands, **options)

    length = 160
    segments = jnp.repeat(jnp.arange(1, 6), 32)[None]
    query, key = jnp.ones((1, length, 4, 8)), jnp.ones((1, length, 2, 8))
    monkeypatch.setattr(blocked.jnp, "einsum", counted)
    blocked.attention(query, key, key, query_segments=segments, key_segments=segments, causal=causal)
    jax.effects_barrier()
    query_block, key_heads = 20, 2
    first, last = np.arange(0, length, query_block) // 32, (np.arange(0, length, query_block) + query_block - 1) // 32
    assert len(calls) == key_heads * int(np.sum(last - first + 1))
