"""The head of the probe: one cross-attention layer with a single learned query, and a linear classifier.

`docs/design/methods.md#probe` describes it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vr_jax.model.layers import linear, merge_heads, normal, normalize, split_heads, xavier

# This is the default of torch.nn.LayerNorm.
EPS = 1e-5


class ProbeHead(nnx.Module):
    """Classifies an image by its tokens: LayerNorm, attention of one learned query to all tokens, linear classifier.

    It computes in float32 what torch.nn.LayerNorm, torch.nn.MultiheadAttention(width, heads, kdim=features,
    vdim=features) and torch.nn.Linear compute. With one query, the projections of keys and values can act on the query
    and on the attended mean instead of on every token, which is exact (`docs/design/decisions.md#decision-6`) and makes
    a head cost next to nothing. The bias of the keys would add one number to all scores, which softmax ignores, so
    there is none.
    """

    def __init__(self, features: int, classes: int, *, width: int, heads: int, rngs: nnx.Rngs):
        """Initializes the parameters.

        Args:
            features: The width of a token.
            classes: The number of classes.
            width: The width of the query and of the attention.
            heads: The number of attention heads.
            rngs: The random numbers of the initial values.
        """
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
        """Returns the logits of the classes.

        Args:
            normalized: The tokens after `normalize_tokens`, which all heads of a tap share.
        """
        key = split_heads(self.k.kernel[...], self.heads)
        value = split_heads(self.v.kernel[...], self.heads)
        query = split_heads(self.q(self.query[...]), self.heads) * key.shape[-1] ** -0.5
        absorbed_query = jnp.einsum("hk,dhk->hd", query, key) * self.scale[...]
        weights = jax.nn.softmax(jnp.einsum("btd,hd->bht", normalized, absorbed_query), axis=-1)
        mean = jnp.einsum("bht,btd->bhd", weights, normalized) * self.scale[...] + self.bias[...]
        bias = self.v.bias[...]  # type: ignore[index]  # The layer is made with a bias.
        attended = merge_heads(jnp.einsum("bhd,dhk->bhk", mean, value)) + bias
        return self.classifier(self.out(attended))


def normalize_tokens(tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies LayerNorm in float32 without its affine part, which each head has for itself."""
    return normalize(tokens, EPS)


def make_heads(features: int, classes: int, seeds: Int[Array, " S"], *, width: int, heads: int) -> ProbeHead:
    """Makes one head per seed. A head depends on its own seed only.

    Args:
        features: The width of a token.
        classes: The number of classes.
        seeds: The seeds of the heads.
        width: The width of the query and of the attention.
        heads: The number of attention heads.

    Returns:
        A module whose every parameter has a leading axis for the seeds.
    """
    return jax.vmap(
        lambda seed: ProbeHead(features, classes, width=width, heads=heads, rngs=nnx.Rngs(jax.random.key(seed)))
    )(seeds)


def logits_of(stacked: ProbeHead, tokens: Float[Array, "B T D"]) -> Float[Array, "S B classes"]:
    """Applies all heads of a tap, stacked as by `make_heads`, to the same tokens."""
    normalized = normalize_tokens(tokens)
    return jax.vmap(lambda head: head(normalized))(stacked)
