"""What cuDNN is given, computed by XLA in its place; and cuDNN itself where there is an NVIDIA GPU."""

import jax
import pytest

from tests.kernels.attention.cases import Case, check
from vr_jax.kernels.attention import cudnn


@pytest.mark.parametrize(
    ("lengths", "causal"), [((137, 137), True), ((137, 137), False), ((137, 138), False), ((138, 137), True)]
)
def test_odd_lengths_are_padded_and_nothing_else_changes(monkeypatch, lengths, causal):
    library, given = jax.nn.dot_product_attention, []

    def by_xla(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        given.append((query.shape[1] % 2, key.shape[1] % 2))
        return library(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    check(cudnn.attention, Case(causal, lengths=lengths))
    assert given == [(0, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(137, 137), (138, 138)])
@pytest.mark.parametrize(("causal", "extra_keys"), [(True, 0), (False, 0), (False, 3)])
def test_values_and_gradients_on_a_gpu(causal: bool, extra_keys: int, lengths: tuple[int, int]):
    check(cudnn.attention, Case(causal, extra_keys, lengths, width=64, dtype="bfloat16"))
