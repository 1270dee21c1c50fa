"""Every projector with Vision Remember, AnyRes and packed rows: samples stay apart, and eight devices equal one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    SampleImage,
    Text,
    example,
    pack,
    quick,
    random_model,
    tiny_config,
    tiny_decoder,
    tiny_projector,
    tiny_refusion,
)
from vr_jax import sharding
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params
from vr_jax.model.vlm import VisionLanguageModel

# Widths that the mesh divides.
FIELDS = {
    "perceiver": {"heads": 8, "head_dim": 64, "depth": 3},
    "token_packer": {"levels": (1, 2), "width": 32, "heads": 4},
    "c_abstractor": {"depth": 3},
    "resampler": {"heads": 4},
}
# The tests of Vision Remember, of packing and of the training step use `pool`; `mlp` is the same with a stride of 1.
NAMES = [name for name in registry.names("projector") if name not in ("pool", "mlp")]


def model_config(name: str) -> VlmConfig:
    projector = tiny_projector(name, 2, **FIELDS.get(name, {}))
    refusion = tiny_refusion(init="torch_default", insert_after=(1,))
    return tiny_config(projector=projector, refusion=refusion, decoder=tiny_decoder(hidden_size=32, num_layers=2))


def samples(config: VlmConfig):
    """A sample with one tile, one with a base tile and a grid of 2 x 1 tiles cropped by unpad, and one of text."""
    question, answer = Text(3, text_token=True), Text(4, target=True)
    return [
        example(config, Text(2), SampleImage(tiles=1), question, answer, seed=1),
        example(config, Text(1), SampleImage(tiles=3, crop=1), question, answer, seed=2),
        example(config, Text(5, text_token=True), answer, seed=3),
    ]


def loss(model: VisionLanguageModel, batch):
    hidden, _ = model(batch)
    weights = jnp.cos(jnp.arange(hidden.shape[-1]))
    score = jnp.einsum("bnd,d->bn", hidden, weights)
    return jnp.sum(jnp.where(batch.loss_mask, jnp.tanh(score), 0)), hidden


@pytest.mark.parametrize("name", quick(NAMES, "pool"))
def test_packing_anyres_and_sharding(name: str):
    config = model_config(name)
    first, second, text = samples(config)
    shape = {"tokens": sum(len(one.tokens) for one in (first, second, text)) + 3, "tiles": 5}
    packed = pack(config, [[first, second, text], [text, second], [first], [second, first]], **shape)
    alone = pack(config, [[first], [second], [text], [first]], **shape)
    model = random_model(config, scale=0.15)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))

    (value, hidden), gradient = run(model, packed)
    (_, separate), _ = run(model, alone)
    begin = 0
    for row, one in enumerate((first, second, text)):
        part = hidden[0, begin : begin + len(one.tokens)]
        np.testing.assert_allclose(part, separate[row, : len(one.tokens)], atol=2e-5, err_msg=f"{name}: sample {row}")
        begin += len(one.tokens)

    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, sharding.param_shardings(model, mesh))
        rows = jax.device_put(packed, sharding.batch_sharding(mesh))
        (sharded, states), sharded_gradient = run(placed, rows)
    assert float(sharded) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(states, hidden, atol=5e-5)
    expected = flatten_params(gradient)
    for path, one in flatten_params(sharded_gradient).items():
        # Key biases cancel in the softmax: their gradient is rounding noise around zero.
        tolerance = 2e-4 * np.abs(expected[path]).max() + 1e-6
        np.testing.assert_allclose(one, expected[path], atol=tolerance, rtol=0, err_msg=path)
