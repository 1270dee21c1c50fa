"""The Perceiver: numbers of latents, and what it refuses."""

from __future__ import annotations

import jax
import pytest

from tests.tiny import SampleImage, Text, example, pack, tiny_config, tiny_projector
from vr_jax.errors import ConfigError
from vr_jax.model.projectors.perceiver import PerceiverConfig
from vr_jax.model.vlm import abstract_model


def test_more_latents_than_windows():
    """Without a re-fusion block, a Perceiver may make any square number of tokens."""
    config = tiny_config(projector=tiny_projector("perceiver", 2, latents=16), refusion=None)
    assert (config.cells_per_side, config.cells_per_tile) == (4, 16)
    batch = pack(config, [[example(config, Text(2), SampleImage(1), Text(2))]])
    hidden, _ = jax.eval_shape(lambda m, b: m(b), abstract_model(config), batch)
    assert hidden.shape == (1, 2 + 16 + 1 + 2, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerceiverConfig(latents=60), "latents = 60: expected a square .* Vision Remember .* 49 or 64"),
        (lambda: PerceiverConfig(latents=0), "latents = 0: expected an integer >= 1"),
        (lambda: PerceiverConfig(depth=0), "PerceiverConfig.depth = 0: expected an integer >= 1"),
        (
            lambda: tiny_config(projector=tiny_projector("perceiver", 2, latents=16)),
            "'vision_remember' .* 'perceiver' makes 4 x 4 tokens, stride 2 makes 3 x 3 windows",
        ),
    ],
)
def test_refusals(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
