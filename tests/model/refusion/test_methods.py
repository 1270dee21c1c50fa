"""DeepStack and SVA: configurations, and the published patch merger itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from tests import torch_weights
from tests.helpers import tiny_config, tiny_refusion
from vr_jax.convert.method_tables import DEEPSTACK
from vr_jax.errors import ConfigError
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig, PatchMerger
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.registry import RefusionConfig


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
    windows[0] *= 1e-3  # shows the epsilon
    expected = official(torch.from_numpy(windows)).detach().numpy()
    np.testing.assert_allclose(jax.jit(ours)(windows), expected, atol=1e-5, rtol=1e-5)


def test_every_third_layer():
    """Cambrian's own positions: eight samplers of a Qwen2-0.5B."""
    config = VlmConfig(refusion=SvaConfig(insert_after=tuple(range(1, 24, 3))))
    assert config.decoder_bounds == (0, 1, 4, 7, 10, 13, 16, 19, 22, 24)
    assert config.refusion.blocks == 8


def test_json_round_trip():
    for refusion in (SvaConfig(depth=2), DeepStackConfig(merger="qwen3_vl")):
        config = VlmConfig(refusion=refusion)
        assert VlmConfig.from_dict(config.to_dict()) == config


ERRORS = {
    "levels of deepstack": (
        lambda: DeepStackConfig(levels=(7, 23)),
        ["2 levels (7, 23)", "3 insertions", "(1, 2, 3)", "one level for each"],
    ),
    "merger": (lambda: DeepStackConfig(merger="mean"), ["merger = 'mean'", "pool_mlp", "qwen3_vl"]),
    "levels of sva": (lambda: SvaConfig(levels=(7, 23)), ["SvaConfig.levels = (7, 23)", "exactly one"]),
    "heads of sva": (lambda: SvaConfig(heads=15), ["heads = 15", "width = 1024"]),
    "depth of sva": (lambda: SvaConfig(depth=0), ["depth = 0", ">= 1"]),
    "layers": (
        lambda: tiny_config(refusion=SvaConfig(levels=(3,))),
        ["insert_after = (1, 4)", "[4]", "1..3"],
    ),
    "hidden states": (
        lambda: tiny_config(refusion=DeepStackConfig()),
        ["refusion.levels", "hidden state 7", "0..4"],
    ),
    "name": (
        lambda: tiny_config(refusion=RefusionConfig(name="flamingo")),
        ["refusion.name = 'flamingo'", "deepstack", "sva", "vision_remember"],
    ),
    "interaction": (
        lambda: tiny_refusion(interaction="windowed"),
        ["interaction = 'windowed'", "local", "deformable", "global"],
    ),
    "points": (lambda: tiny_refusion(points=0), ["points = 0", ">= 1"]),
    "heads of the deformable attention": (
        lambda: tiny_config(refusion=tiny_refusion(interaction="deformable", cross_heads=6)),
        ["cross_heads = 6", "16"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message_names_field_found_and_expected(name: str):
    build, words = ERRORS[name]
    with pytest.raises(ConfigError) as error:
        build()
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)
