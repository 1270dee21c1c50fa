"""The projector that does not compress."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.tiny import abstract_projector, randomized, tiny_config, tiny_projector
from vr_jax.errors import ConfigError
from vr_jax.model.projectors.mlp import MlpConfig


def test_equal_to_pooling_windows_of_one_patch():
    features = jax.random.normal(jax.random.key(0), (2, 36, 1, 16))
    found = [
        randomized(abstract_projector(tiny_config(projector=tiny_projector(name, 1), refusion=None)))(features)
        for name in ("mlp", "pool")
    ]
    np.testing.assert_array_equal(*found)


def test_a_stride_is_refused():
    with pytest.raises(ConfigError, match=r"MlpConfig\.stride = 2: expected an integer >= 1 and <= 1"):
        MlpConfig(stride=2)
