"""The head against torch.nn.MultiheadAttention; heads side by side do not know of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from tests.tiny import params_of, randomized
from vr_jax.probe.head import ProbeHead, logits_of, make_heads, normalize_tokens
from vr_jax.probe.training import loss_of

FEATURES, WIDTH, HEADS, CLASSES = 10, 16, 4, 5


def test_equal_to_torch():
    head = randomized(ProbeHead(FEATURES, CLASSES, width=WIDTH, heads=HEADS, rngs=nnx.Rngs(0)), scale=0.5)
    values = {name: torch.from_numpy(np.array(value)) for name, value in params_of(head).items()}
    norm = torch.nn.LayerNorm(FEATURES)
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, kdim=FEATURES, vdim=FEATURES, batch_first=True)
    key_bias = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))  # adds one number to all scores
    norm.load_state_dict({"weight": values["scale"], "bias": values["bias"]})
    attention.load_state_dict(
        {
            "q_proj_weight": values["q.kernel"].T,
            "k_proj_weight": values["k.kernel"].T,
            "v_proj_weight": values["v.kernel"].T,
            "in_proj_bias": torch.cat([values["q.bias"], key_bias, values["v.bias"]]),
            "out_proj.weight": values["out.kernel"].T,
            "out_proj.bias": values["out.bias"],
        }
    )
    tokens = np.random.default_rng(1).normal(2, 3, (3, 7, FEATURES)).astype(np.float32)
    with torch.no_grad():
        keys = norm(torch.from_numpy(tokens))
        attended, _ = attention(values["query"].expand(3, 1, WIDTH), keys, keys)
        expected = attended[:, 0] @ values["classifier.kernel"] + values["classifier.bias"]
    found = jax.jit(lambda head, tokens: head(normalize_tokens(tokens)))(head, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_head_depends_on_its_own_seed_only():
    """However many heads there are: their weights, and what training makes of them."""
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

    changed = {**tokens, "b": tokens["b"].at[5].add(jnp.arange(4.0))}  # weight 0
    np.testing.assert_allclose(trained(jnp.arange(3), changed)[0]["b"][:, :5], together["b"][:, :5], atol=1e-5)


def test_the_first_attention_is_nearly_uniform():
    """The query starts small, so a head begins as a classifier on the mean token, whatever it attends to later."""
    head = ProbeHead(FEATURES, CLASSES, width=512, heads=8, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, FEATURES)), jnp.float32)
    normalized = normalize_tokens(tokens)
    mean = jnp.broadcast_to(jnp.mean(normalized, axis=1, keepdims=True), normalized.shape)
    np.testing.assert_allclose(head(normalized), head(mean), atol=0.03)
