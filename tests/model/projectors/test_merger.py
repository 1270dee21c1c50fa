"""Qwen2.5-VL's merger against transformers, on square tiles and at another stride too."""

import jax
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

from tests import torch_weights
from tests.qwen2_5_vl import MERGER
from tests.tiny import abstract_projector, tiny_config, tiny_projector
from vr_jax.model.projectors.merger import MergerConfig


@pytest.mark.parametrize("stride", [2, 3])
def test_values(stride: int):
    config = tiny_config(projector=tiny_projector("merger", stride))
    width, out = config.encoder.hidden_size, config.decoder.hidden_size
    theirs = Qwen2_5_VLPatchMerger(dim=out, context_dim=width, spatial_merge_size=stride).eval()
    torch_weights.randomize(theirs)
    features = np.random.default_rng(0).normal(size=(2, 9, stride**2, width)).astype(np.float32)
    features[0, 0] *= 1e-3  # A wrong epsilon of the norm is seen.
    with torch.no_grad():
        expected = theirs(torch.from_numpy(features).reshape(-1, width)).numpy()
    ours = torch_weights.load(abstract_projector(config), MERGER, torch_weights.state_dict(theirs), "projector.")
    found = jax.jit(lambda ours, features: ours(features))(ours, features)
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, atol=1e-5, rtol=1e-5)


def test_operations():
    """By hand: 9 cells of 4 patches of 16 channels, to 24 channels."""
    config = tiny_config(projector=MergerConfig())
    assert config.projector.flops_per_tile(config.spec) == 2 * 9 * (64 * 64 + 64 * 24)
