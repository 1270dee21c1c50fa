"""The head equals torch's modules, and starts as a classifier on the mean token."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from tests.tiny import params_of, randomized
from vr_jax.probe.head import ProbeHead, normalize_tokens

FEATURES, WIDTH, HEADS, CLASSES = 10, 16, 4, 5


def test_the_head_equals_torch():
    head = randomized(ProbeHead(FEATURES, CLASSES, width=WIDTH, heads=HEADS, rngs=nnx.Rngs(0)), scale=0.5)
    values = {name: torch.from_numpy(np.array(value)) for name, value in params_of(head).items()}
    norm = torch.nn.LayerNorm(FEATURES)
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, kdim=FEATURES, vdim=FEATURES, batch_first=True)
    # The bias of the keys adds one number to all scores, so it must not matter.
    key_bias = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
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


def test_the_first_attention_is_nearly_uniform():
    """The query starts small, so an untrained head classifies the mean token."""
    head = ProbeHead(FEATURES, CLASSES, width=512, heads=8, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, FEATURES)), jnp.float32)
    normalized = normalize_tokens(tokens)
    mean = jnp.broadcast_to(jnp.mean(normalized, axis=1, keepdims=True), normalized.shape)
    np.testing.assert_allclose(head(normalized), head(mean), atol=0.03)
