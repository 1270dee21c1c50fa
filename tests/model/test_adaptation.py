"""Adapted layers against formulas in float64, against qwix's provider, and equal tree structures of several builds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import tiny_config
from vr_jax.model.adaptation import Adaptation, adapt, initial_adapter, linear_kernels, merged_kernel
from vr_jax.model.layers import linear
from vr_jax.model.vlm import abstract_model

RNG = np.random.default_rng(0)


def adapted_layer(rank=3, scale=0.5, dtype=jnp.float32):
    layer = linear(8, 5, dtype=dtype, rngs=nnx.Rngs(0))
    layer.lora_a = nnx.Param(jnp.asarray(RNG.normal(size=(8, rank)), jnp.float32))
    layer.lora_b = nnx.Param(jnp.asarray(RNG.normal(size=(rank, 5)), jnp.float32))
    layer.lora_scale = scale
    return layer


def test_values_and_gradients_equal_the_formulas_in_float64():
    layer = adapted_layer()
    x, weight = RNG.normal(size=(7, 8)), RNG.normal(size=(7, 5))
    w, bias, a, b = (np.asarray(p[...], np.float64) for p in (layer.kernel, layer.bias, layer.lora_a, layer.lora_b))
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), x @ (w + 0.5 * a @ b) + bias, atol=2e-5)
    np.testing.assert_allclose(layer.weight(), w + 0.5 * a @ b, atol=1e-5)

    def total(layer, x):
        return jnp.sum(layer(x) * jnp.asarray(weight, jnp.float32))

    grads, dx = jax.grad(total, argnums=(0, 1), allow_int=True)(layer, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(grads.lora_a[...], 0.5 * x.T @ weight @ b.T, atol=1e-4)
    np.testing.assert_allclose(grads.lora_b[...], 0.5 * (x @ a).T @ weight, atol=1e-4)
    np.testing.assert_allclose(dx, weight @ (w + 0.5 * a @ b).T, atol=1e-4)


def test_a_layer_equals_that_of_the_provider_of_qwix():
    """Whose scale is alpha / rank; its matrices have the names kernel_lora_a and kernel_lora_b."""
    qwix = pytest.importorskip("qwix")
    ours = adapted_layer(rank=4, scale=2.0)
    theirs = linear(8, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(7, 8)), jnp.float32)
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    theirs = qwix.apply_lora_to_model(theirs, provider, x, rngs=nnx.Rngs(0))
    theirs.kernel_lora_a, theirs.kernel_lora_b = ours.lora_a, ours.lora_b
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def adaptation():
    kernels = linear_kernels(abstract_model(tiny_config()))
    adapted = frozenset(path for path in kernels if path.startswith("decoder.stages"))
    return Adaptation(adapted=adapted, rank=2, scale=1.5, quantised=frozenset(kernels), kind="nf4")


def test_two_builds_have_equal_tree_structures():
    first, second = (jax.tree.structure(adapt(abstract_model(tiny_config()), adaptation())) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != jax.tree.structure(abstract_model(tiny_config()))


def test_the_head_and_the_embedding_of_patches_are_no_candidates():
    config = tiny_config()
    found = linear_kernels(abstract_model(config))
    assert "decoder.stages.0.attn.q.kernel" in found
    assert any(path.startswith("encoder.stages.0.mlp") for path in found)
    assert any(path.startswith("refusion.blocks.0") for path in found)
    assert not [path for path in found if "lm_head" in path or "patch_embed" in path or "norm" in path]


def test_an_adapter_begins_as_in_peft():
    a = np.asarray(initial_adapter("decoder.stages.0.attn.q.lora_a", (3, 400, 8), seed=1))
    assert np.abs(a).max() == pytest.approx(400**-0.5, rel=0.01)
    assert a.std() == pytest.approx(400**-0.5 / 3**0.5, rel=0.05)
    other = initial_adapter("decoder.stages.0.attn.k.lora_a", (3, 400, 8), seed=1)
    assert not np.array_equal(a, other)
    assert not np.any(initial_adapter("decoder.stages.0.attn.q.lora_b", (3, 8, 400), seed=1))


def test_a_merged_kernel_is_the_sum():
    params = {
        "a.kernel": jnp.asarray(RNG.normal(size=(2, 8, 6)), jnp.bfloat16),
        "a.lora_a": jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32),
        "a.lora_b": jnp.asarray(RNG.normal(size=(2, 3, 6)), jnp.float32),
    }
    found = merged_kernel(params, "a.kernel", Adaptation(adapted=frozenset(["a.kernel"]), rank=3, scale=0.25))
    w, a, b = (np.asarray(params[name], np.float64) for name in params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, w + 0.25 * np.einsum("lir,lro->lio", a, b), atol=1e-5)
