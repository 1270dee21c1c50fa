"""Adafactor against transformers, and its factored moments on a mesh and in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec
from transformers.optimization import Adafactor

from tests.training.tiny import PLAIN
from vr_jax import sharding
from vr_jax.settings import OptimizerSettings
from vr_jax.training.adafactor import FactoredMoments, factors
from vr_jax.training.checkpoint import Checkpoints
from vr_jax.training.optimizer import make_optimizer, make_schedule, moments
from vr_jax.training.state import ModelTree, TrainState, abstract_state, shardings_of

SHAPES = {
    "projector.fc1.kernel": (9, 7),
    "projector.fc1.bias": (7,),
    "decoder.stages.0.mlp.up.kernel": (3, 6, 5),  # three layers
    "decoder.stages.0.input_norm.scale": (3, 6),
    "decoder.stages.0.attention.query.kernel": (2, 6, 4, 3),  # two layers of four heads
    "decoder.stages.0.mlp.up.lora_a": (2, 6, 1),  # two layers of one column
    "encoder.position": (1, 8),
}


def one_by_one(path, value):
    """The matrices and vectors of a stack, each a parameter of its own as torch has them."""
    width = 1 if path.endswith((".bias", ".scale")) else 2
    return value.reshape(-1, *value.shape[-width:]) if value.ndim > width else value[None]


@pytest.mark.parametrize(("decay_rate", "clipping_threshold"), [(0.8, 1.0), (0.5, 0.3)])
def test_trajectory_equals_that_of_transformers(decay_rate, clipping_threshold):
    """transformers in float32 is at most 6e-7 from itself in float64; the bound is ten times that."""
    config = OptimizerSettings(
        name="adafactor",
        lr=3e-2,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        weight_decay=0.1,
        clip_norm=1e9,
        warmup_ratio=0.0,
        schedule="constant",
        lr_groups=(("encoder.*", 2e-3),),
    )
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    weights = {k: [torch.nn.Parameter(torch.tensor(one)) for one in one_by_one(k, v)] for k, v in start.items()}
    reference = Adafactor(
        [
            {
                "params": parts,
                "lr": 2e-3 if path.startswith("encoder.") else 3e-2,
                "weight_decay": 0.0 if path.endswith((".bias", ".scale")) else 0.1,
            }
            for path, parts in weights.items()
        ],
        decay_rate=-decay_rate,
        clip_threshold=clipping_threshold,
        scale_parameter=False,
        relative_step=False,
    )
    optimizer = make_optimizer(config, make_schedule(config, 100), SHAPES)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(10):
        scale = 10.0 ** rng.integers(-4, 2)
        grad = {path: (rng.normal(size=shape) * scale).astype(np.float32) for path, shape in SHAPES.items()}
        grad["projector.fc1.kernel"][:, 2] *= 1e-3  # a column that is smaller than the others
        if step == 3:
            grad["decoder.stages.0.mlp.up.kernel"][1] = 0  # a layer without a gradient
        for path, parts in weights.items():
            for part, one in zip(parts, one_by_one(path, grad[path]), strict=True):
                part.grad = torch.tensor(one)
        reference.step()
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for path, parts in weights.items():
        expected = np.stack([part.detach().numpy() for part in parts]).reshape(SHAPES[path])
        np.testing.assert_allclose(params[path], expected, rtol=6e-6, atol=6e-6, err_msg=path)
        assert np.abs(params[path] - start[path]).max() > 1e-3


def test_matrices_keep_rows_and_columns_and_nothing_keeps_a_first_moment():
    assert [path for path, shape in SHAPES.items() if factors(path, shape)] == [
        "projector.fc1.kernel",
        "decoder.stages.0.mlp.up.kernel",
        "decoder.stages.0.attention.query.kernel",
    ]
    config = OptimizerSettings(name="adafactor")
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    state = jax.eval_shape(make_optimizer(config, make_schedule(config, 9), SHAPES).init, params)
    first, second = moments(state)
    assert first == []
    assert sorted(leaf.shape for leaf in second) == sorted(
        [(9,), (7,), (7,), (3, 6), (3, 5), (3, 6), (2, 6, 4), (2, 6, 3), (2, 6, 1), (1, 8)]
    )


def factored(state):
    """The moments in a state of the optimizer."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, FactoredMoments))
    (found,) = (part for part in parts if isinstance(part, FactoredMoments))
    return found


def program(**sizes):
    """The optimizer of all parameters of a model, and the state without arrays on a mesh."""
    tree = ModelTree(PLAIN)
    config = OptimizerSettings(name="adafactor", warmup_ratio=0.0)
    optimizer = make_optimizer(config, make_schedule(config, 100), tree.shapes)
    return optimizer, abstract_state(tree, optimizer, tree.shapes, sharding.make_mesh(**sizes), "float32")


def random_like(abstract, seed):
    """Positive arrays of the shapes, types and shardings of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), leaf.sharding), abstract
    )


def test_factors_of_moments_lie_as_the_axes_that_they_share_with_their_parameter():
    _, abstract = program(replica=1, fsdp=4, tensor=2)
    found, divided = factored(abstract.opt_state), 0
    for path, param in abstract.params.items():
        spec = [*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec))]
        if path in found.full:
            assert found.full[path].sharding == param.sharding
            continue
        assert found.rows[path].sharding.spec == PartitionSpec(*spec[:-1])
        assert found.columns[path].sharding.spec == PartitionSpec(*spec[:-2], spec[-1])
        divided += any(spec[:-1]) + any([*spec[:-2], spec[-1]])
    assert divided > 10


@pytest.mark.slow  # Two updates of a whole model are compiled.
def test_eight_devices_compute_what_one_does_and_keep_the_layout():
    results = []
    for sizes in ({"replica": 2, "fsdp": 2, "tensor": 2}, {"replica": 1, "fsdp": 1, "tensor": 1}):
        devices = jax.devices()[: np.prod(list(sizes.values()))]
        tree, config = ModelTree(PLAIN), OptimizerSettings(name="adafactor", warmup_ratio=0.0)
        optimizer = make_optimizer(config, make_schedule(config, 100), tree.shapes)
        abstract = abstract_state(tree, optimizer, tree.shapes, sharding.make_mesh(**sizes, devices=devices), "float32")
        params, grads = random_like(abstract.params, 0), random_like(abstract.params, 1)
        layout = (shardings_of(abstract.params), shardings_of(abstract.opt_state))
        state = jax.jit(optimizer.init, out_shardings=layout[1])(params)
        update = jax.jit(optimizer.update, out_shardings=layout)
        for _ in range(2):
            updates, state = update(grads, state, params)
        results.append(jax.tree.map(np.asarray, (updates, factored(state))))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), *results)


def test_a_checkpoint_continues_on_another_mesh(tmp_path):
    _, abstract = program(replica=1, fsdp=8, tensor=1)
    step = jax.device_put(jnp.int32(3), abstract.step.sharding)
    state = TrainState(step, random_like(abstract.params, 0), {}, random_like(abstract.opt_state, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, data={}, config={}, skip_statistics={}, metrics={"loss": 1.0})
    _, other = program(replica=2, fsdp=2, tensor=2)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_newest(other).state
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert jax.tree.leaves(shardings_of(restored.opt_state)) == jax.tree.leaves(shardings_of(other.opt_state))
