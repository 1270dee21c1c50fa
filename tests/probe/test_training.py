"""Heads are trained independently of one another, and count right answers of readable images only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vr_jax.model.config import single_tile
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.head import logits_of, make_heads
from vr_jax.probe.images import Reader
from vr_jax.probe.training import count_correct, loss_of

FEATURES, WIDTH, HEADS, CLASSES = 10, 16, 4, 5


@pytest.mark.slow  # Two sets of heads are compiled.
def test_a_head_depends_on_its_own_seed_only():
    """Its weights, and what training makes of them, do not change with the number of other heads."""
    tokens = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, FEATURES)), jnp.float32)}
    tokens["b"] = tokens["a"][:, :, :4] * 30
    labels, weights = jnp.array([0, 1, 2, 3, 4, 0]), jnp.array([1.0, 1, 1, 1, 1, 0])
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def trained(seeds, tokens):
        heads = {name: make_heads(x.shape[-1], CLASSES, seeds, width=WIDTH, heads=HEADS) for name, x in tokens.items()}

        def step(carry, _):
            heads, state = carry
            grads, losses = jax.grad(loss_of, has_aux=True)(heads, tokens, labels, weights)
            updates, state = optimizer.update(grads, state, heads)
            return (optax.apply_updates(heads, updates), state), losses

        (heads, _), losses = jax.lax.scan(step, (heads, optimizer.init(heads)), length=3)
        last = {name: loss[-1] for name, loss in losses.items()}
        return {name: logits_of(heads[name], tokens[name]) for name in tokens}, last

    together, losses = trained(jnp.arange(3), tokens)
    alone, loss = trained(jnp.array([2]), {"b": tokens["b"]})
    np.testing.assert_allclose(together["b"][2], alone["b"][0], atol=1e-5)
    np.testing.assert_allclose(losses["b"][2], loss["b"][0], rtol=1e-5)
    assert np.abs(together["b"][2] - together["b"][1]).max() > 0.05, "seeds differ"

    changed = {**tokens, "b": tokens["b"].at[5].add(jnp.arange(4.0))}  # The image 5 has weight 0.
    np.testing.assert_allclose(trained(jnp.arange(3), changed)[0]["b"][:, :5], together["b"][:, :5], atol=1e-5)


@pytest.mark.slow  # Heads are compiled and trained.
def test_an_unreadable_image_is_wrong_whatever_the_head_answers(setting):
    data = tiny_imagenet.read(setting.data)
    (batch,) = Reader(data.folder, single_tile(24)).batches(data.val, 72)
    head = make_heads(5, 4, jnp.arange(1), width=8, heads=2)
    labels, weights = jnp.asarray(batch.labels), jnp.asarray(batch.weights)
    right = 0
    for label in range(4):
        head.classifier.bias[...] = 1e6 * jax.nn.one_hot(np.array([label]), 4)
        counted = count_correct({"x": head}, {"x": jnp.ones((72, 2, 5))}, labels, weights)
        assert counted["x"] <= 16
        right += int(counted["x"][0])
    assert right == 62, "each of the 62 readable images is right once, and the others never"
