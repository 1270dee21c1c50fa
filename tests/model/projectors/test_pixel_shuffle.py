"""PixelShuffle against InternVL in transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import torch_weights
from tests.tiny import abstract_projector, tiny_config, tiny_projector
from vr_jax.convert.tables import mlp_projector, norm
from vr_jax.model.windows import to_windows

torch = pytest.importorskip("torch", reason="the reference is transformers' InternVL")


def test_equal_to_transformers():
    """InternVL's own shuffle and projector give the same; its float ratio 1 / stride is exact for stride 2."""
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config = tiny_config(projector=tiny_projector("pixel_shuffle"), refusion=None)
    reference = internvl.InternVLMultiModalProjector(
        InternVLConfig(
            vision_config=InternVLVisionConfig(hidden_size=16),
            text_config=Qwen2Config(hidden_size=24),
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
        )
    )
    torch_weights.randomize(reference)
    names = (*norm("layer_norm", "projector.norm"), *mlp_projector("linear_1", "linear_2"))
    projector = torch_weights.load(abstract_projector(config), names, torch_weights.state_dict(reference), "projector.")
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 16)).astype(np.float32)
    with torch.no_grad():
        shuffle = functools.partial(internvl.InternVLModel.pixel_shuffle, None)
        shuffled = shuffle(torch.from_numpy(x), scale_factor=0.5)
        expected = reference(shuffled.reshape(3, 9, -1)).numpy()
    windows = to_windows(jnp.asarray(x.reshape(3, 36, 16)), 2)
    np.testing.assert_allclose(windows.reshape(3, 9, -1), shuffled.numpy().reshape(3, 9, -1))
    np.testing.assert_allclose(jax.jit(lambda p, x: p(x))(projector, windows), expected, atol=1e-5)
