"""DeepStack: the published patch merger, and what the config refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from tests import minicpm, torch_weights
from tests.tiny import randomized, tiny_config
from vr_jax.convert.method_tables import DEEPSTACK
from vr_jax.errors import ConfigError
from vr_jax.model.refusion.deepstack import DeepStackConfig, PatchMerger, PoolMerger


@pytest.mark.parametrize("norm_per_patch", [False, True])
def test_patch_merger_is_that_of_transformers(norm_per_patch: bool):
    stride, width, out = 2, 12, 10
    official = Qwen3VLVisionPatchMerger(
        Qwen3VLVisionConfig(hidden_size=width, spatial_merge_size=stride, out_hidden_size=out),
        use_postshuffle_norm=not norm_per_patch,
    )
    torch_weights.randomize(official)
    ours = nnx.eval_shape(
        lambda: PatchMerger(width, stride**2, out, norm_per_patch=norm_per_patch, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    named = {f"deepstack_merger_list.3.{name}": value for name, value in torch_weights.state_dict(official).items()}
    ours = torch_weights.load(ours, DEEPSTACK, named, "refusion.blocks.3.merger.")
    windows = np.random.default_rng(0).normal(size=(5, stride**2, width)).astype(np.float32)
    windows[0] *= 1e-3  # The epsilon of the norm matters here.
    expected = official(torch.from_numpy(windows)).detach().numpy()
    np.testing.assert_allclose(jax.jit(ours)(windows), expected, atol=1e-5, rtol=1e-5)


def test_the_pooled_merger_takes_the_mean_of_the_valid_patches():
    """Windows of different sizes give what each would give alone; patches that are not valid may be anything."""
    merger = randomized(nnx.eval_shape(lambda: PoolMerger(12, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    windows = np.random.default_rng(0).normal(size=(4, 6, 12)).astype(np.float32)
    sizes = [6, 1, 3, 0]
    valid = np.arange(6) < np.array(sizes)[:, None]
    windows[~valid] = np.nan
    found = jax.jit(merger)(windows, valid)
    for k, size in enumerate(sizes):
        alone = merger(windows[k, :size]) if size else merger(jnp.zeros((1, 12)))
        np.testing.assert_allclose(found[k], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DeepStackConfig(levels=(7, 23)),
            r"2 levels \(7, 23\) for 3 insertions .*: expected one level for each",
        ),
        (lambda: DeepStackConfig(merger="mean"), "merger = 'mean': expected one of 'pool_mlp', 'qwen3_vl'"),
        (
            lambda: minicpm.tiny_config(
                refusion=DeepStackConfig(insert_after=(1,), levels=(1,), merger="qwen3_vl"),
            ),
            r"refusion\.merger = 'qwen3_vl' with an encoder of the layout 'raster'",
        ),
        (lambda: tiny_config(refusion=DeepStackConfig()), r"refusion\.levels: hidden state 7 .* 0\.\.4"),
    ],
)
def test_refusals(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
