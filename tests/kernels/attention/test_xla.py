"""Attention by XLA against the reference in float64."""

import pytest

from tests.kernels.attention.cases import Case, check
from vr_jax.kernels.attention import xla


@pytest.mark.parametrize(("causal", "extra_keys"), [(True, 0), (False, 0), (False, 3)])
def test_values_and_gradients(causal: bool, extra_keys: int):
    check(xla.attention, Case(causal, extra_keys))
