"""Every family gives the same numbers and gradients on eight devices as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.families import FAMILIES, family_config, family_rows
from tests.tiny import pack, params_of, random_model
from vr_jax import sharding


# The gradient of a whole model is compiled twice; training/test_step.py compares LLaVA's updates.
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_equal_one(family: str):
    """The mesh has all three axes; each device has rows of its own, of which some have no image.

    The gradients are summed as an update sums them, in each replica by itself and then over the replicas.
    """
    config = family_config(family)
    decoder = dataclasses.replace(config.decoder, hidden_size=32, num_kv_heads=2)
    config = family_config(family, decoder=decoder)
    first, second = family_rows(family, config)
    batch = pack(config, [first, second, [first[1]], second])
    model = random_model(config, scale=0.15)

    def forward(batch, model):
        return model(batch)[0]

    def gradients(batch, model):
        def loss(model):
            return jnp.sum(jnp.sin(forward(batch, model)) * (batch.segment_ids > 0)[..., None])

        return jax.grad(loss)(model)

    def run(batch, model):
        return forward(batch, model), sharding.sum_over_replicas(gradients)(batch, model)

    hidden, alone = jax.jit(run)(batch, model)
    mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, sharding.param_shardings(model, mesh))
        sharded = jax.jit(run)(jax.device_put(batch, sharding.batch_sharding(mesh)), placed)
    real = np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(sharded[0])[real], np.asarray(hidden)[real], atol=2e-5, rtol=1e-5)
    expected, found = params_of(alone), params_of(sharded[1])
    for path, one in expected.items():
        # Key biases cancel in the softmax, so that their gradient is rounding noise around zero.
        np.testing.assert_allclose(found[path], one, atol=2e-4 * np.abs(one).max() + 2e-5, rtol=0, err_msg=path)
    assert any(np.abs(one).max() > 0 for path, one in expected.items() if path.startswith("encoder."))
    kernel = placed.encoder.stages[0].attn.q.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0], *(x // 2 for x in kernel.shape[1:]))
