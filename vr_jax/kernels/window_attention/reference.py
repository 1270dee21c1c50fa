"""Windowed cross-attention in plain XLA; it defines what every backend computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def window_attention(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K dv"],
    valid: Bool[Array, "W S"] | None,
    scale: float,
) -> Float[Array, "W H dv"]:
    """Computes softmax(scale * query . key) . value per window; the arguments are those of `api.window_attention`."""
    weights = window_weights(query, key, valid, scale).astype(value.dtype)
    if value.shape[2] == 1:
        return jnp.einsum("whs,wsv->whv", weights, value[:, :, 0])
    return jnp.einsum("whs,wshv->whv", weights, value)


def window_weights(
    query: Float[Array, "W H d"], key: Float[Array, "W S K d"], valid: Bool[Array, "W S"] | None, scale: float
) -> Float[Array, "W H S"]:
    """Computes the softmax over the keys of each window, in float32; it is zero for keys that are not valid."""
    if key.shape[2] == 1:
        logits = jnp.einsum("whd,wsd->whs", query, key[:, :, 0], preferred_element_type=jnp.float32)
    else:
        logits = jnp.einsum("whd,wshd->whs", query, key, preferred_element_type=jnp.float32)
    logits = logits * scale
    if valid is not None:
        # A finite floor keeps the softmax of a window without a valid key, and its gradient, free of NaN.
        logits = jnp.where(valid[:, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights if valid is None else jnp.where(valid[:, None, :], weights, 0.0)
