"""The spatial vision aggregator: Cambrian's positions, and what the config refuses."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config
from vr_jax.errors import ConfigError
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.sva import SvaConfig


def test_every_third_layer():
    """Cambrian's own positions are eight samplers of a Qwen2-0.5B."""
    config = VlmConfig(refusion=SvaConfig(insert_after=tuple(range(1, 24, 3))))
    assert config.decoder_bounds == (0, 1, 4, 7, 10, 13, 16, 19, 22, 24)
    assert config.refusion.blocks == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SvaConfig(levels=(7, 23)), r"SvaConfig\.levels = \(7, 23\): expected exactly one"),
        (lambda: SvaConfig(heads=15), "heads = 15 does not divide width = 1024"),
        (lambda: SvaConfig(depth=0), "depth = 0: expected an integer >= 1"),
        (
            lambda: tiny_config(refusion=SvaConfig(levels=(3,), insert_after=(1, 5))),
            r"insert_after = \(1, 5\): \[5\] outside the decoder; expected values in 1\.\.4",
        ),
    ],
)
def test_refusals(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
