import tests.model.projectors.test_all_on_a_mesh as t
import jax, numpy as np, pytest
from vr_jax import sharding
from vr_jax.model.parameters import flatten_params
from tests.tiny import *
@pytest.mark.parametrize("name", t.NAMES)
def test_it(name):
    config = t.model_config(name); first, second, text = t.samples(config)
    shape = {"tokens": sum(len(one.tokens) for one in (first, second, text)) + 3, "tiles": 5}
    packed = t.pack(config, [[first, second, text], [text, second], [first], [second, first]], **shape)
    model = t.random_model(config, scale=0.15)
    g = lambda b, m: jax.grad(lambda m: t.loss(m,b)[0])(m)
    expected = flatten_params(jax.jit(g)(packed, model))
    mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, sharding.param_shardings(model, mesh))
        rows = jax.device_put(packed, sharding.batch_sharding(mesh))
        found = flatten_params(jax.jit(sharding.sum_over_replicas(g))(rows, placed))
    for path, one in found.items():
        np.testing.assert_allclose(one, expected[path], atol=2e-4 * np.abs(expected[path]).max() + 1e-6, rtol=0, err_msg=path)
