"""SigLIP hidden states against transformers: every depth, any stride, images that are no multiple of the patch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests import torch_weights
from tests.tiny import tiny_encoder
from vr_jax.convert.tables import VISION
from vr_jax.model.encoders.siglip import Siglip
from vr_jax.model.windows import to_windows

# (image size, patch size): 6 x 6 patches; the second drops 3 pixels, as so400m/14-384 drops 6.
SIZES = [(24, 4), (27, 4)]


@functools.cache
def reference(image_size: int, patch_size: int):
    """Our config, their weights, pixels and hidden states in raster order."""
    config = tiny_encoder(image_size=image_size, patch_size=patch_size)
    torch.manual_seed(0)
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        )
    ).eval()
    torch_weights.randomize(model)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, image_size, image_size, 3), dtype=np.uint8)
    values = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        output = model((values / 255 - 0.5) / 0.5, output_hidden_states=True)
    states = [state.numpy().reshape(2, 2, -1, config.hidden_size) for state in output.hidden_states]
    return config, torch_weights.state_dict(model), pixels, states


def build(config, weights, stride: int, bounds: tuple[int, ...]) -> Siglip:
    siglip = nnx.eval_shape(lambda: Siglip(config, stride=stride, bounds=bounds, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return torch_weights.load(siglip, VISION, weights, "encoder.")


@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_hidden_states_at_every_depth(image_size: int, patch_size: int, stride: int):
    config, weights, pixels, states = reference(image_size, patch_size)
    levels = tuple(range(config.num_layers + 1))
    siglip = build(config, weights, stride, levels)
    found = jax.jit(lambda siglip, pixels: siglip(pixels, levels))(siglip, pixels)
    assert len(found) == len(states) == 5
    for ours, theirs in zip(found, states, strict=True):
        np.testing.assert_allclose(ours, to_windows(theirs, stride), atol=2e-5, rtol=1e-5)


def test_stages_do_not_change_the_result_and_blocks_beyond_are_not_run():
    config, weights, pixels, states = reference(*SIZES[0])
    siglip = build(config, weights, 2, (0, 1, 3, 4))
    # NaN in the last block: it must not be run for hidden state 3.
    siglip.stages[2] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), siglip.stages[2])
    (found,) = jax.jit(lambda siglip, pixels: siglip(pixels, (3,)))(siglip, pixels)
    np.testing.assert_allclose(found, to_windows(states[3], 2), atol=2e-5, rtol=1e-5)


def test_a_level_inside_a_stage_is_an_error():
    config, weights, pixels, _ = reference(*SIZES[0])
    with pytest.raises(ValueError, match=r"\[2\] are not stage bounds \(0, 1, 4\)"):
        build(config, weights, 2, (0, 1, 4))(pixels, (2,))
