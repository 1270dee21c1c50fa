"""The resampler of Qwen-VL and MiniCPM-V: resized positions against torch, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tests import minicpm
from tests.tiny import tiny_config, tiny_decoder, tiny_projector
from vr_jax.errors import ConfigError
from vr_jax.model.projectors.resampler import bicubic

torch = pytest.importorskip("torch", reason="the reference is torch's interpolate")


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (4, 8), (8, 24), (9, 24), (8, 3), (2, 7)])
def test_bicubic_weights_are_those_of_torch(inputs, outputs):
    x = np.random.default_rng(0).normal(size=(inputs, inputs))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(x[None, None]), size=(outputs, outputs), mode="bicubic", align_corners=False
    )
    weights = bicubic(inputs, outputs)
    np.testing.assert_allclose(weights @ x @ weights.T, resized.numpy()[0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config(projector=tiny_projector("resampler", heads=5)), "heads = 5 .* width 24"),
        (
            lambda: tiny_config(
                projector=tiny_projector("resampler"), decoder=tiny_decoder(hidden_size=18, num_heads=2), refusion=None
            ),
            r"decoder\.hidden_size = 18 is not divisible by 4",
        ),
        (
            lambda: tiny_config(projector=tiny_projector("resampler", queries=3)),
            r"projector\.queries = 3 with an encoder of the layout 'square': set it to None",
        ),
        (
            lambda: minicpm.tiny_config(projector=tiny_projector("resampler")),
            r"projector\.queries = None with an encoder of the layout 'raster': set the number",
        ),
        (
            lambda: minicpm.tiny_config(projector=tiny_projector("resampler", queries=3, adaptive=False)),
            r"projector\.adaptive = False with an encoder of the layout 'raster'",
        ),
    ],
)
def test_refusals(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
