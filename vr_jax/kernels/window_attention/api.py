"""Windowed cross-attention: each window's single query attends to that window's keys."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention import reference

BACKENDS = {"reference": reference.window_attention}


def window_attention(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K dv"],
    valid: Bool[Array, "W S"] | None = None,
    *,
    scale: float | None = None,
    backend: str = "reference",
) -> Float[Array, "W H dv"]:
    """softmax(query . key * scale) . value per window, softmax in float32.

    W windows, S keys per window, H heads; K = H (each head its own keys) or 1 (keys shared by the heads, the
    absorbed form). `valid` False hides a key; a window without a valid key gives zeros and zero gradients.
    scale defaults to d ** -0.5. Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"window_attention backend {backend!r}: expected one of {sorted(BACKENDS)}")
    return BACKENDS[backend](query, key, value, valid, query.shape[-1] ** -0.5 if scale is None else scale)


def window_weights(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    valid: Bool[Array, "W S"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "W H S"]:
    """The softmax of `window_attention`, float32, to look at: no backend of the forward pass hands it out."""
    return reference.window_weights(query, key, valid, query.shape[-1] ** -0.5 if scale is None else scale)
