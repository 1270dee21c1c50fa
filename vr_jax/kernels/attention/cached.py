"""Attention of one new token per row over the keys and values of a decoder's cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vr_jax.sharding import platform


def cached_attention(
    query: Float[Array, "B 1 H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B 1 H K"]:
    """Computes the attention of one new token per row over its cache, with the softmax in float32.

    `jax.nn.dot_product_attention` is not used because it takes heads after slots: XLA's program for CPUs would then
    transpose the cache for every token (docs/results/speed.md).

    Args:
        query: The queries of the new tokens, in H heads.
        key: The keys of S slots in G heads, each shared by H / G consecutive query heads.
        value: The values of the slots.
        valid: The slots that a new token may attend to, at least one per row.

    Returns:
        The attended values, in the type of `query`.
    """
    grouped = query.reshape(*key.shape[:2], -1, query.shape[-1])
    if platform() == "cpu":
        # XLA's CPU product of a few rows with the transpose of a long matrix takes more than twice as long as this sum.
        rows, slots = grouped.astype(jnp.float32)[:, :, :, None], key.astype(jnp.float32)[:, :, None]
        logits = jnp.sum(rows * slots, axis=-1)
    else:
        logits = jnp.einsum("bghk,bgsk->bghs", grouped, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min), axis=-1)
    attended = jnp.einsum("bghs,bgsk->bghk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return attended.astype(query.dtype).reshape(query.shape)
