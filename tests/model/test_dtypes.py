"""bfloat16 activations over float32 parameters: what is computed in which precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import (
    SampleImage,
    Text,
    example,
    pack,
    params_of,
    randomized,
    tiny_config,
    tiny_refusion,
    with_params,
)
from vr_jax.model.layers import Embedding
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

FULL = tiny_config(refusion=tiny_refusion(ffn_multiplier=1, self_positions="rope"))
HALF = dataclasses.replace(FULL, dtype="bfloat16")
WIDE, NARROW = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def equations(jaxpr):
    """Every primitive application, those inside of scans, conditionals and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return randomized(abstract_model(HALF), scale=0.15)


@pytest.fixture(scope="module")
def batch():
    return pack(HALF, [[example(HALF, Text(2), SampleImage(2), Text(4, text_token=True), Text(3, target=True))]])


@pytest.fixture(scope="module")
def traced(model, batch):
    return list(equations(jax.make_jaxpr(lambda model, batch: model.logits(model(batch)[0]))(model, batch).jaxpr))


def operands(traced, primitive: str) -> set:
    found = {v.aval.dtype for e in traced if e.primitive.name == primitive for v in e.invars if hasattr(v, "aval")}
    assert found, primitive
    return found


def test_norms_and_softmax_are_float32(traced):
    assert operands(traced, "rsqrt") == {WIDE}
    assert operands(traced, "exp") == {WIDE}
    assert operands(traced, "cos") == {WIDE}


def test_matrix_products_are_bfloat16(traced):
    """All but products with a vector, of which the absorbed value bias is one."""
    narrow, wide = 0, []
    for e in traced:
        if e.primitive.name != "dot_general":
            continue
        a, b = (v.aval for v in e.invars)
        (contract, _), (batch_axes, _) = e.params["dimension_numbers"]
        free = [x.ndim - len(contract) - len(batch_axes) for x in (a, b)]
        if a.dtype == b.dtype == NARROW:
            narrow += 1
        elif min(free) > 0:
            wide.append((a, b))
    assert narrow > 20
    assert wide == []


def test_activations_cache_and_logits(model, batch):
    hidden, cache = jax.eval_shape(lambda m, b: m(b, cache=m.init_cache(1, 40)), model, batch)
    assert hidden.dtype == NARROW
    assert {(stage.keys.dtype, stage.values.dtype) for stage in cache} == {(NARROW, NARROW)}
    assert jax.eval_shape(lambda m, h: m.logits(h), model, hidden).dtype == WIDE
    levels = jax.eval_shape(lambda m, b: m.encode_images(b), model, batch)
    assert {level.dtype for level in levels.values()} == {NARROW}


@pytest.mark.slow  # The gradient of the whole model is compiled in bfloat16.
def test_parameters_and_gradients_stay_float32(model, batch):
    def loss(model, batch):
        return jnp.mean(jax.nn.logsumexp(model.logits(model(batch)[0]), axis=-1))

    gradients = params_of(jax.jit(jax.grad(loss))(model, batch))
    assert {value.dtype for value in params_of(model).values()} == {np.dtype(np.float32)}
    assert {value.dtype for value in gradients.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(value).all() for value in gradients.values())


def test_gradients_of_a_repeated_token_add_up_in_float32():
    """In bfloat16 a sum of 1000 equal terms stops growing at 256 of them."""
    embed = Embedding(3, 2, init=nnx.initializers.ones, dtype=NARROW, rngs=nnx.Rngs(0))
    tokens = jnp.ones((1, 1000), jnp.int32)
    gradient = jax.grad(lambda embed: embed(tokens).sum().astype(WIDE))(embed).embedding[...]
    np.testing.assert_array_equal(gradient, [[0, 0], [1000, 1000], [0, 0]])


@pytest.mark.slow  # The whole model is compiled in both types.
def test_close_to_float32(model, batch):
    run = jax.jit(lambda model, batch: model(batch)[0])
    exact = with_params(abstract_model(FULL), params_of(model))
    half, full = np.asarray(run(model, batch), np.float32), np.asarray(run(exact, batch))
    error = np.sqrt(np.mean((half - full) ** 2) / np.mean(full**2))
    assert 1e-4 < error < 0.03
