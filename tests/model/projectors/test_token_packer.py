"""TokenPacker: its bilinear queries against torch, and what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny_config, tiny_projector
from vr_jax.errors import ConfigError
from vr_jax.model.projectors.token_packer import shrink
from vr_jax.model.windows import to_windows

torch = pytest.importorskip("torch", reason="the reference is torch's interpolate")


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6])
def test_queries_are_a_bilinear_resize(stride):
    grid = 60 // stride * stride
    x = np.random.default_rng(0).normal(size=(2, grid, grid, 3)).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), size=grid // stride, mode="bilinear", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).numpy().reshape(2, -1, 3)
    np.testing.assert_allclose(shrink(to_windows(jnp.asarray(x.reshape(2, -1, 3)), stride)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny_config(projector=tiny_projector("token_packer", levels=(3, 12))),
            r"projector\.levels: hidden state 12 does not exist, the encoder has 0\.\.4",
        ),
        (lambda: tiny_projector("token_packer", levels=(3, 2)), r"levels = \(3, 2\): .* strictly increasing"),
        (lambda: tiny_config(projector=tiny_projector("token_packer", heads=5)), "projector.heads = 5 .* width 12"),
    ],
)
def test_refusals(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
