"""The chunked loss against the reference in float64, and what its compiled programs contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.cross_entropy.cases import LENGTH, ROWS, WORDS, exact, plain, problem, value_and_gradients
from tests.noise import assert_within_noise
from vr_jax.kernels.cross_entropy import cross_entropy, cross_entropy_of_each, reference
from vr_jax.sharding import batch_sharding, make_mesh

CHUNK = 4


@pytest.mark.parametrize("chunk", [1, CHUNK, 7, LENGTH, 1000])
def test_value_and_gradients(chunk):
    found = value_and_gradients(functools.partial(cross_entropy, chunk=chunk))(*problem())
    assert_within_noise(found, exact(*problem()), plain(*problem()))
    assert not np.any(found[1][0][1]), "a row without targets has no gradient"


def each_by_formula(hidden, kernel, targets, mask):
    logits = np.einsum("bnd,dv->bnv", *(np.asarray(x, np.float64) for x in (hidden, kernel)))
    lse = np.log(np.exp(logits).sum(-1))
    return np.where(mask, lse - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0], 0.0)


@pytest.mark.parametrize("chunk", [CHUNK, 7, 1000])
def test_the_loss_of_each_position_and_no_gradient_through_it(chunk):
    hidden, kernel, targets, mask = problem()

    def loss(hidden, kernel):
        total, each = cross_entropy_of_each(hidden, kernel, targets, mask, chunk=chunk)
        return total + 100 * each.sum(), each

    def plain_loss(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, mask, chunk=chunk)

    (_, each), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)
    np.testing.assert_allclose(each, each_by_formula(*problem()), rtol=1e-5, atol=1e-5)
    expected = jax.grad(plain_loss, argnums=(0, 1))(hidden, kernel)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)


def all_shapes(jaxpr):
    """Yields the shapes of all arrays in a jaxpr, also in nested ones (scan, cond, checkpoint)."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)


def test_no_array_of_all_logits_exists():
    hidden, kernel, targets, mask = problem()
    chunk = 12  # More than the width, and no other size here.

    def loss(function):
        return jax.value_and_grad(lambda h, k: function(h, k), argnums=(0, 1))

    def largest(function):
        shapes = set(all_shapes(jax.make_jaxpr(loss(function))(hidden, kernel).jaxpr))
        return max(np.prod(s[:-1]) for s in shapes if s and s[-1] == WORDS)

    positions = ROWS * LENGTH
    found = largest(lambda h, k: reference.cross_entropy(h, k, targets, mask))
    assert found == positions, "the probe finds full logits"
    assert largest(lambda h, k: cross_entropy(h, k, targets, mask, chunk=chunk)) == chunk

    compiled = jax.jit(loss(lambda h, k: cross_entropy(h, k, targets, mask, chunk=chunk)))
    text = compiled.lower(hidden, kernel).compile().as_text()
    assert f"[{chunk},{WORDS}]" in text
    chunks = -(-positions // chunk)
    for rows in (f"{ROWS},{LENGTH}", f"{positions}", f"{chunks * chunk}", f"{chunks},{chunk}"):
        assert f"[{rows},{WORDS}]" not in text


def test_chunks_without_targets_are_skipped():
    """The vocabulary product runs as often as the targets need, wherever they lie in the rows."""
    hidden, kernel, targets, mask = problem()
    needed = -(-int(mask.sum()) // CHUNK)
    calls = []

    def counting_logsumexp(x, axis):
        jax.debug.callback(lambda _: calls.append(1), x[0, 0])
        return jax.scipy.special.logsumexp(x, axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "logsumexp", counting_logsumexp)
        cross_entropy(hidden, kernel, targets, mask, chunk=CHUNK).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == needed < -(-ROWS * LENGTH // CHUNK)


@pytest.mark.parametrize(("differentiated", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_only_requested_gradients_are_computed(differentiated, products):
    """One product is for the logits and one for each gradient; a frozen vocabulary takes none."""
    hidden, kernel, targets, mask = problem()

    def loss(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, mask, chunk=CHUNK)

    function = jax.grad(loss, argnums=differentiated) if differentiated else loss
    text = jax.jit(function).lower(hidden, kernel).as_text()
    assert text.count("stablehlo.dot_general") == products


def test_bfloat16_gradient_of_the_head_is_accumulated_in_float32():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 512, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(8, WORDS)), jnp.float32)
    targets, mask = jnp.asarray(rng.integers(0, WORDS, (1, 512))), jnp.ones((1, 512), bool)

    def grad(chunk):
        return jax.grad(lambda k: cross_entropy(hidden, k, targets, mask, chunk=chunk))(kernel)

    whole, pieces = grad(512), grad(4)
    assert pieces.dtype == jnp.float32
    error = np.abs(pieces - whole).max() / np.abs(whole).max()
    assert error < 2**-8, f"128 sums in bfloat16 would lose more than one rounding, relative error {error}"


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_a_mesh_changes_nothing_and_the_kernels_gradient_leaves_a_device_once(mesh):
    """The gradient of the head is not communicated once per chunk."""
    rng = np.random.default_rng(0)
    rows, length, width, words = 8, 24, 32, 128
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, words)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, words, (rows, length)))
    # The devices differ in their number of chunks.
    mask = jnp.asarray(rng.random((rows, length)) < np.linspace(0, 0.6, rows)[:, None])

    def loss(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, mask, chunk=CHUNK)

    mesh = make_mesh(*mesh)
    own, cut = batch_sharding(mesh), NamedSharding(mesh, P("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=(own, cut), out_shardings=(None, (own, cut))
        )
        compiled = step.lower(hidden, kernel).compile()
        found = compiled(jax.device_put(hidden, own), jax.device_put(kernel, cut))
    arrays = (hidden, kernel, targets, mask)
    found = jax.tree.map(lambda total: np.asarray(total) / np.float32(mask.sum()), found)
    assert_within_noise(found, exact(*arrays), plain(*arrays))
    # The gradient is summed over fsdp straight into the pieces that are updated, and those over replica.
    text, words = compiled.as_text(), words // mesh.shape["tensor"]
    scattered = re.findall(rf"f32\[{width // mesh.shape['fsdp']},{words}\][^=]*reduce-scatter\(", text)
    reduced = re.findall(rf"f32\[\d+,{words}\][^=]*all-reduce\(", text)
    assert len(scattered) == (mesh.shape["fsdp"] > 1)
    assert len(reduced) == (mesh.shape["replica"] > 1)

    with jax.set_mesh(mesh):
        function = jax.jit(functools.partial(cross_entropy_of_each, chunk=CHUNK))
        each = function(*(jax.device_put(x, own if x is not kernel else cut) for x in arrays))[1]
    np.testing.assert_allclose(each, each_by_formula(*arrays), rtol=1e-5, atol=1e-5)
