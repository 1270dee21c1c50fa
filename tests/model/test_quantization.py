"""Quantised kernels: codes and values against an independent implementation and qwix, products and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.errors import UserError
from vr_jax.model import quantization
from vr_jax.model.layers import linear
from vr_jax.model.quantization import (
    dequantise,
    import_qwix,
    nf4_block,
    quantise,
    quantised_product,
    quantised_structs,
)
from vr_jax.sharding import make_mesh

qwix = pytest.importorskip("qwix", reason="quantises")


def kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * 0.02


def code_book():
    """NF4 by its definition: quantiles of the normal distribution, eight positive and seven negative ones, and zero.

    Source: Dettmers et al. 2023, Section 3; bitsandbytes `functional.py`, create_normal_map, whose offset this is."""
    from statistics import NormalDist

    offset, normal = 0.9677083, NormalDist()
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative]))
    return values / values.max()


def numpy_nf4(matrix, block):
    """Each block of the flattened rows of torch's (out, in) weight, as bitsandbytes cuts it."""
    blocks = np.asarray(matrix, np.float64).T.reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    book = code_book()
    codes = np.abs((blocks / scale)[..., None] - book).argmin(axis=-1)
    return (book[codes] * scale).reshape(matrix.shape[::-1]).T


def test_the_code_book_is_that_of_the_definition():
    np.testing.assert_allclose(quantization.NF4, code_book(), atol=1e-6)


@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (64, 64), (96, 48), (4304, 16), (6, 6), (74, 2)])
def test_nf4_is_that_of_an_independent_implementation(inputs, block):
    assert nf4_block(inputs) == block
    weights = kernel(inputs, 12)
    found = np.asarray(dequantise(*quantise(weights, "nf4")))
    # The recorded code book has the precision of float32; a value near the middle of two codes could take either.
    np.testing.assert_allclose(found, numpy_nf4(weights, block), atol=1e-6 * float(jnp.abs(weights).max()))


def test_int8_is_that_of_an_independent_implementation():
    weights = np.asarray(kernel(40, 12), np.float64)
    scale = np.abs(weights).max(axis=0) / 127  # as in bitsandbytes
    expected = np.round(weights / scale) * scale
    codes, scales = quantise(jnp.asarray(weights, jnp.float32), "int8")
    assert codes.dtype == jnp.int8
    np.testing.assert_allclose(np.asarray(dequantise(codes, scales)), expected, atol=1e-6 * np.abs(weights).max())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_stacked_layers_are_those_alone_and_equal_qwix(kind):
    weights = kernel(3, 64, 10)
    codes, scales = jax.jit(lambda w: quantise(w, kind))(weights)
    assert [(a.shape, a.dtype) for a in (codes, scales)] == [
        (s.shape, s.dtype) for s in quantised_structs(weights.shape, kind)
    ]
    options = {"nf4": {"tiled_axes": {0: 64}}, "int8": {"calibration_method": f"absmax,{127.5 / 127}"}}[kind]
    for layer in range(3):
        theirs = qwix.quantize(weights[layer], "nf4" if kind == "nf4" else jnp.int8, channelwise_axes=(1,), **options)
        found = dequantise(codes[layer], scales[layer])
        np.testing.assert_allclose(found, qwix.dequantize(theirs), rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_product_and_its_gradient_are_those_of_the_dequantised_kernel(kind):
    stored = quantise(kernel(64, 10), kind)
    x, weight = kernel(5, 64, seed=1) * 50, kernel(5, 10, seed=2)

    def total(product):
        return lambda x: jnp.sum(product(x) * weight)

    expected = jax.value_and_grad(total(lambda x: x @ dequantise(*stored)))(x)
    found = jax.value_and_grad(total(lambda x: quantised_product(x, *stored)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_scan_keeps_no_dequantised_kernel_for_the_backward_pass(kind):
    """Whatever the model recomputes: the gradient has no array of all layers' kernels in a type of floats."""
    stored = quantise(kernel(3, 64, 64), kind)

    def loss(x):
        return jnp.sum(jax.lax.scan(lambda x, one: (jnp.tanh(quantised_product(x, *one)), None), x, stored)[0])

    shapes = re.findall(r"(?:f32|bf16|float32|bfloat16)\[3,64,64\]", str(jax.make_jaxpr(jax.grad(loss))(kernel(5, 64))))
    assert not shapes


def test_a_kernel_that_is_cut_both_ways_stays_cut():
    """No collective moves the values of the kernel in floats; qwix's own look-up does (its docstring says how)."""
    mesh = make_mesh(1, 4, 2)
    codes, scales = quantise(kernel(256, 64), "nf4")
    where = NamedSharding(mesh, P("fsdp", "tensor"))
    codes, scales = jax.device_put(codes, where), jax.device_put(scales, where)
    x = jax.device_put(kernel(16, 256), NamedSharding(mesh, P(("replica", "fsdp"), None)))
    with jax.set_mesh(mesh):
        product = jax.jit(lambda *arrays: quantised_product(*arrays, (None, "tensor")))
        compiled = product.lower(x, codes, scales).compile().as_text()
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled)
    assert "u8" in {kind for kind, _ in moved}
    sizes = [np.prod([int(n) for n in shape.split(",")]) for kind, shape in moved if kind == "f32"]
    assert max(sizes, default=0) <= 16 * 256  # the vectors at most


def test_a_plain_layer_computes_what_it_did():
    """The class changes nothing where nothing is adapted: the values are those of nnx.Linear, bit for bit."""
    layer = linear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plain = nnx.Linear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plain.kernel, plain.bias = layer.kernel, layer.bias
    x = kernel(3, 8)
    np.testing.assert_array_equal(layer(x), plain(x))


def test_without_qwix_the_message_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(UserError, match=r"need qwix .*pip install 'vr-jax\[lora\]'"):
        import_qwix()
