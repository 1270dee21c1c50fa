"""The probe's head: one cross-attention layer with a single learned query, then a linear classifier (methods.md 7)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vr_jax.model.layers import linear, merge_heads, normal, normalize, split_heads, xavier

EPS = 1e-5  # torch's default


class ProbeHead(nnx.Module):
    """LayerNorm, one query, torch.nn.MultiheadAttention(width, heads, kdim=features, vdim=features), Linear; float32.

    With one query the key and value projections act on the query and on the attended mean instead of on every token,
    which is the same (design decision 3) and makes a head cost next to nothing. The key's bias adds one number to all
    scores, which softmax ignores, so it does not exist."""

    def __init__(self, features: int, classes: int, *, width: int, heads: int, rngs: nnx.Rngs):
        make = functools.partial(linear, dtype=jnp.float32, rngs=rngs, init=xavier)
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.query = nnx.Param(normal(0.02)(rngs.params(), (width,)))
        self.q = make(width, width)
        self.k = make(features, width, use_bias=False)
        self.v = make(features, width)
        self.out = linear(width, width, dtype=jnp.float32, rngs=rngs, bias_init=nnx.initializers.zeros)
        self.classifier = linear(width, classes, dtype=jnp.float32, rngs=rngs)
        self.heads = heads

    def __call__(self, normalized: Float[Array, "B T D"]) -> Float[Array, "B classes"]:
        """normalized: tokens after `normalize_tokens`, which all heads of a tap share."""
        key = split_heads(self.k.kernel[...], self.heads)
        value = split_heads(self.v.kernel[...], self.heads)
        query = split_heads(self.q(self.query[...]), self.heads) * key.shape[-1] ** -0.5
        read = jnp.einsum("hk,dhk->hd", query, key) * self.scale[...]
        weights = jax.nn.softmax(jnp.einsum("btd,hd->bht", normalized, read), axis=-1)
        mean = jnp.einsum("bht,btd->bhd", weights, normalized) * self.scale[...] + self.bias[...]
        attended = merge_heads(jnp.einsum("bhd,dhk->bhk", mean, value)) + self.v.bias[...]  # type: ignore[index]
        return self.classifier(self.out(attended))


def normalize_tokens(tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The LayerNorm without its affine part, which is each head's own; float32."""
    return normalize(tokens, EPS)


def make_heads(features: int, classes: int, seeds: Int[Array, " S"], *, width: int, heads: int) -> ProbeHead:
    """One head per seed, as a module whose every parameter has a leading axis. A head depends on its own seed only."""
    return jax.vmap(
        lambda seed: ProbeHead(features, classes, width=width, heads=heads, rngs=nnx.Rngs(jax.random.key(seed)))
    )(seeds)


def logits_of(stacked: ProbeHead, tokens: Float[Array, "B T D"]) -> Float[Array, "S B classes"]:
    """All heads of a tap on the same tokens."""
    normalized = normalize_tokens(tokens)
    return jax.vmap(lambda head: head(normalized))(stacked)
