"""What the C-Abstractor refuses; its recorded outputs are in tests/golden."""

from __future__ import annotations

import pytest

from vr_jax.errors import ConfigError
from vr_jax.model.projectors.c_abstractor import CAbstractorConfig


def test_a_depth_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"CAbstractorConfig\.depth = 0: expected an integer >= 1"):
        CAbstractorConfig(depth=0)
