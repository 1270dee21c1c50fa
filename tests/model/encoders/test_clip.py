"""CLIP's hidden states against transformers: every depth, any stride, images that are no multiple of the patch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests import torch_weights
from tests.tiny import tiny_config, tiny_projector
from vr_jax.convert.tables import CLIP_VISION
from vr_jax.errors import ConfigError
from vr_jax.model.config import single_tile
from vr_jax.model.encoders.clip import Clip, ClipConfig
from vr_jax.model.pruning.vispruner import VisPrunerConfig
from vr_jax.model.windows import to_windows

# (image size, patch size, activation): 4 x 4 and 6 x 6 patches, whose sides have the ratio of 224 to 336, and one whose
# last pixels are dropped.
SIZES = [(16, 4, "quick_gelu"), (24, 4, "quick_gelu"), (27, 4, "gelu")]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SCALE, SHIFT = tuple(1 / 255 / std for std in STD), tuple(mean / std for mean, std in zip(MEAN, STD, strict=True))


@functools.cache
def reference(image_size: int, patch_size: int, activation: str):
    """Our config, their weights, pixels, and hidden states of the patches in raster order, in float32 and float64."""
    config = ClipConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=4,
        num_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        activation=activation,
        layer_norm_eps=1e-4,  # far from the default, so that another epsilon is seen
    )
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=image_size,
            patch_size=patch_size,
            hidden_act=activation,
            layer_norm_eps=config.layer_norm_eps,
        )
    ).eval()
    torch_weights.randomize(model)
    weights = torch_weights.state_dict(model)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, image_size, image_size, 3), dtype=np.uint8)
    values = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])).permute(0, 3, 1, 2).double()
    mean, std = (torch.tensor(one, dtype=torch.float64).reshape(3, 1, 1) for one in (MEAN, STD))
    values = (values / 255 - mean) / std
    found = []
    for number in (torch.float32, torch.float64):
        with torch.no_grad():
            output = model.to(number)(values.to(number), output_hidden_states=True)
        states = [state[:, 1:].numpy() for state in output.hidden_states]
        found.append([state.reshape(2, 2, -1, config.hidden_size) for state in states])
    return config, weights, pixels, *found


def build(config, weights, stride: int, bounds: tuple[int, ...]) -> Clip:
    clip = nnx.eval_shape(
        lambda: Clip(
            config,
            stride=stride,
            bounds=bounds,
            dtype=jnp.float32,
            pixel_scale=SCALE,
            pixel_shift=SHIFT,
            rngs=nnx.Rngs(0),
        )
    )
    return torch_weights.load(clip, CLIP_VISION, weights, "encoder.")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_hidden_states_at_every_depth(size, stride: int):
    config, weights, pixels, states, exact = reference(*size)
    levels = tuple(range(config.num_layers + 1))
    clip = build(config, weights, stride, levels)
    found = jax.jit(lambda clip, pixels: clip(pixels, levels))(clip, pixels)
    assert len(found) == len(exact) == 5
    # float32 in torch is off its float64 by at most 3e-6. The bound is seven times that.
    assert max(np.abs(one - two).max() for one, two in zip(states, exact, strict=True)) < 3e-6
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours, to_windows(theirs, stride), atol=2e-5, rtol=0)


def test_stages_do_not_change_the_result_and_blocks_beyond_are_not_run():
    config, weights, pixels, _, exact = reference(*SIZES[1])
    clip = build(config, weights, 2, (0, 1, 3, 4))
    # NaN in the last block: it must not be run for hidden state 3.
    clip.stages[2] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), clip.stages[2])
    (found,) = jax.jit(lambda clip, pixels: clip(pixels, (3,)))(clip, pixels)
    np.testing.assert_allclose(found, to_windows(exact[3], 2), atol=2e-5, rtol=0)


def test_a_level_inside_a_stage_is_an_error():
    config, weights, pixels, _, _ = reference(*SIZES[1])
    with pytest.raises(ValueError, match=r"\[2\] are not stage bounds \(0, 1, 4\)"):
        build(config, weights, 2, (0, 1, 4))(pixels, (2,))


def test_operations_are_those_of_the_matrix_products():
    """XLA's count of a tower of one layer, whose norms, softmax and activations are a small rest."""
    config = ClipConfig(hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, image_size=32, patch_size=4)
    clip = nnx.eval_shape(
        lambda: Clip(
            config,
            stride=1,
            bounds=(0, 1),
            attention_backend="xla",
            dtype=jnp.float32,
            pixel_scale=SCALE,
            pixel_shift=SHIFT,
            rngs=nnx.Rngs(0),
        )
    )
    pixels = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    costs = jax.jit(lambda clip, pixels: clip(pixels, (1,))).lower(clip, pixels).compile().cost_analysis()
    assert config.flops_per_tile(1) == pytest.approx(costs["flops"], rel=0.08)


def test_vispruner_is_refused_by_name():
    encoder = ClipConfig(hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, image_size=24, patch_size=4)
    with pytest.raises(ConfigError, match=r"'vispruner' ranks patches by .* the encoder 'clip' does not give"):
        tiny_config(
            encoder=encoder,
            projector=tiny_projector("mlp"),
            refusion=None,
            pruning=VisPrunerConfig(tokens=8),
            image=single_tile(24),
            vision_feature_layer=3,
        )
