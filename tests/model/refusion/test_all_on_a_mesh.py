"""Every re-fusion block gives the same numbers and gradients on eight devices as on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import params_of, quick, random_model
from tests.training.tiny import noise_batch, tiny_config
from vr_jax import sharding
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig

REFUSION = {
    "global": VisionRememberConfig(insert_after=(1,), levels=(1, 2), interaction="global", cross_heads=4),
    "deformable": VisionRememberConfig(insert_after=(1,), levels=(1, 2), interaction="deformable", cross_heads=4),
    "deepstack": DeepStackConfig(insert_after=(1,), levels=(2,)),
    "deepstack, patch merger": DeepStackConfig(insert_after=(1,), levels=(2,), merger="qwen3_vl"),
    "sva": SvaConfig(insert_after=(1,), levels=(2,), width=32, heads=4),
}


@pytest.mark.slow  # Gradients are compiled twice; training/test_step.py does so for Vision Remember.
@pytest.mark.parametrize("name", quick(REFUSION, "sva"))
def test_eight_devices_equal_one(name: str):
    """The mesh has all three axes, because XLA has partitioned two products in a row wrongly on such a mesh.

    The gradients are summed as an update sums them, in each replica by itself and then over the replicas.
    """
    config = tiny_config(refusion=REFUSION[name])
    model = random_model(config, scale=0.1)
    batch = noise_batch(0)

    def forward(batch, model):
        return model(batch)[0]

    def gradients(batch, model):
        def loss(model):
            return jnp.sum(jnp.sin(forward(batch, model)) * (batch.segment_ids > 0)[..., None])

        return jax.grad(loss)(model).refusion

    def run(batch, model):
        return forward(batch, model), sharding.sum_over_replicas(gradients)(batch, model)

    hidden, alone = jax.jit(run)(jax.tree.map(jnp.asarray, batch), model)
    mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, sharding.param_shardings(model, mesh))
        sharded = jax.jit(run)(jax.device_put(batch, sharding.batch_sharding(mesh)), placed)
    real = batch.segment_ids > 0
    np.testing.assert_allclose(np.asarray(sharded[0])[real], np.asarray(hidden)[real], atol=1e-5, rtol=1e-5)
    expected, found = params_of(alone), params_of(sharded[1])
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-4, rtol=1e-4, err_msg=path)
    kernels = [x for x in jax.tree.leaves(placed.refusion) if x.ndim >= 2 and x.size > 256]
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in kernels)
