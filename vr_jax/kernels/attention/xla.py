"""Attention by XLA, for every platform."""

from __future__ import annotations

import jax
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
    """Computes `reference.attention` by `jax.nn.dot_product_attention`, which XLA compiles like any other code."""
    mask = None
    if query_segments is not None and key_segments is not None:
        mask = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="xla")
