"""Attention in a few lines of jax.numpy, without a library; it defines what every backend computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"] | None,
    key_segments: Int[Array, "B M"] | None,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Computes attention with all logits of a row in memory.

    The softmax is computed in float32, or in float64 where the arrays are float64. A query that attends to no key gets
    the mean of all values, which is finite and otherwise unspecified.

    Args:
        query: H query heads.
        key: G key heads, each shared by H / G consecutive query heads.
        value: G value heads.
        query_segments: The segment of each query, or None if every query attends to every key.
        key_segments: The segment of each key, or None together with `query_segments`.
        causal: Whether a query attends only to keys whose index is at most its own.

    Returns:
        The attended values, in the type of `query`.
    """
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, queries, groups, heads // groups, width)
    logits = jnp.einsum("bngrk,bmgk->bgrnm", grouped, key, preferred_element_type=dtype) * width**-0.5
    visible = jnp.ones((batch, queries, keys), bool)
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= jnp.arange(queries)[:, None] >= jnp.arange(keys)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, jnp.finfo(dtype).min), axis=-1)
    attended = jnp.einsum("bgrnm,bmgk->bngrk", weights.astype(value.dtype), value, preferred_element_type=dtype)
    return attended.reshape(query.shape).astype(query.dtype)
