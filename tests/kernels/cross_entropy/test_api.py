"""The chunked loss against plain full-logits cross-entropy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.kernels.cross_entropy.api import chunked_cross_entropy, next_token_targets
from vr_jax.model.batch import Batch
from vr_jax.sharding import batch_sharding, make_mesh

B, N, D, V, CHUNK = 3, 22, 8, 101, 4


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, N, D)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, N)))
    counts = rng.random((B, N)) < 0.3
    counts[1] = False  # a row without targets
    return hidden, kernel, targets, jnp.asarray(counts)


def plain(hidden, kernel, targets, counts):
    """Summed cross-entropy from all logits at once; the textbook form."""
    log_probs = jax.nn.log_softmax(jnp.einsum("bnd,dv->bnv", hidden, kernel), axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * counts)


@pytest.mark.parametrize("chunk", [1, CHUNK, 7, N, 1000])
def test_value_and_gradients_equal_plain_cross_entropy(problem, chunk):
    hidden, kernel, targets, counts = problem

    def chunked(h, k):
        return chunked_cross_entropy(h, k, targets, counts, chunk=chunk) / counts.sum()

    def reference(h, k):
        return plain(h, k, targets, counts) / counts.sum()

    value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, kernel)
    expected, expected_grads = jax.value_and_grad(reference, argnums=(0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)
    assert not np.any(grads[0][1]), "a row without targets has no gradient"


def all_shapes(jaxpr):
    """Shapes of every array in a jaxpr, nested ones (scan, cond, checkpoint) included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)


def test_no_array_of_all_logits_exists(problem):
    hidden, kernel, targets, counts = problem
    chunk = 12  # more than D, and no other size here

    def loss(function):
        return jax.value_and_grad(lambda h, k: function(h, k), argnums=(0, 1))

    def largest(function):
        shapes = set(all_shapes(jax.make_jaxpr(loss(function))(hidden, kernel).jaxpr))
        return max(np.prod(s[:-1]) for s in shapes if s and s[-1] == V)

    assert largest(lambda h, k: plain(h, k, targets, counts)) == B * N, "the probe sees full logits"
    assert largest(lambda h, k: chunked_cross_entropy(h, k, targets, counts, chunk=chunk)) == chunk

    compiled = jax.jit(loss(lambda h, k: chunked_cross_entropy(h, k, targets, counts, chunk=chunk)))
    text = compiled.lower(hidden, kernel).compile().as_text()
    assert f"[{chunk},{V}]" in text
    for rows in (f"{B},{N}", f"{B * N}", f"{B * N + -B * N % chunk}", f"{-(-B * N // chunk)},{chunk}"):
        assert f"[{rows},{V}]" not in text


def test_chunks_without_targets_are_skipped(problem):
    """The vocabulary product runs as often as the targets need, however they are spread over the rows."""
    hidden, kernel, targets, counts = problem
    needed = -(-int(counts.sum()) // CHUNK)
    calls = []

    def counting_logsumexp(x, axis):
        jax.debug.callback(lambda _: calls.append(1), x[0, 0])
        return jax.scipy.special.logsumexp(x, axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "logsumexp", counting_logsumexp)
        chunked_cross_entropy(hidden, kernel, targets, counts, chunk=CHUNK).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == needed < -(-B * N // CHUNK)


@pytest.mark.parametrize(("differentiated", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_only_what_is_differentiated_is_computed(problem, differentiated, products):
    """One product for the logits, one for each gradient: none for a frozen vocabulary's, nothing twice."""
    hidden, kernel, targets, counts = problem

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, counts, chunk=CHUNK)

    function = jax.grad(loss, argnums=differentiated) if differentiated else loss
    text = jax.jit(function).lower(hidden, kernel).as_text()
    assert text.count("stablehlo.dot_general") == products


def test_bfloat16_gradient_of_the_head_is_accumulated_in_float32():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 512, D)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets, counts = jnp.asarray(rng.integers(0, V, (1, 512))), jnp.ones((1, 512), bool)

    def grad(chunk):
        return jax.grad(lambda k: chunked_cross_entropy(hidden, k, targets, counts, chunk=chunk))(kernel)

    whole, pieces = grad(512), grad(4)
    assert pieces.dtype == jnp.float32
    error = np.abs(pieces - whole).max() / np.abs(whole).max()
    assert error < 2**-8, f"128 sums in bfloat16 would lose more than one rounding, relative error {error}"


def test_targets_stay_inside_their_sample():
    row = {
        "tokens": [10, 11, 12, 20, 21, 22, 0, 0],
        "segment_ids": [1, 1, 1, 2, 2, 2, 0, 0],
        "loss_mask": [1, 0, 1, 1, 1, 0, 0, 1],
    }
    fields = {k: jnp.asarray([v]) for k, v in row.items()}
    batch = Batch(
        **{**fields, "loss_mask": fields["loss_mask"].astype(bool)},
        positions=fields["tokens"],
        text_token_mask=fields["tokens"],
        vision_cell=fields["tokens"],
        tile_pixels=jnp.zeros((1, 0, 2, 2, 3)),
        tile_segment=jnp.zeros((1, 0)),
        tile_image=jnp.zeros((1, 0)),
    )
    targets, counts = next_token_targets(batch)
    predicted = {int(p): int(targets[0, p]) for p in np.flatnonzero(counts[0])}
    # Token 0 of a sample has no predecessor in it; padding is never a target.
    assert predicted == {1: 12, 3: 21}


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_the_kernels_gradient_leaves_a_device_once(mesh):
    """Not once per chunk; and on a mesh, value and gradients are the same."""
    rng = np.random.default_rng(0)
    rows, length, width, words = 8, 24, 32, 128
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, words)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, words, (rows, length)))
    counts = jnp.asarray(rng.random((rows, length)) < np.linspace(0, 0.6, rows)[:, None])  # shards differ in chunks

    def loss(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, counts, chunk=CHUNK)

    expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, kernel, targets, counts)
    mesh = make_mesh(*mesh)
    own, cut = batch_sharding(mesh), NamedSharding(mesh, P("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=(own, cut), out_shardings=(None, (own, cut))
        )
        compiled = step.lower(hidden, kernel).compile()
        found = compiled(jax.device_put(hidden, own), jax.device_put(kernel, cut))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    # Summed over fsdp straight into the pieces that are updated; over replica, what is left of it.
    text, words = compiled.as_text(), words // mesh.shape["tensor"]
    scattered = re.findall(rf"f32\[{width // mesh.shape['fsdp']},{words}\][^=]*reduce-scatter\(", text)
    reduced = re.findall(rf"f32\[\d+,{words}\][^=]*all-reduce\(", text)
    assert len(scattered) == (mesh.shape["fsdp"] > 1)
    assert len(reduced) == (mesh.shape["replica"] > 1)
