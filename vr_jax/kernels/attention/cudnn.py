"""Attention by cuDNN, for NVIDIA GPUs in half precision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vr_jax.kernels.attention.on_devices import on_own_rows_and_heads
from vr_jax.sharding import mesh_in_context

# Segments of padding positions. They differ, so that padded queries and keys match nothing that is read.
_QUERY_PADDING, _KEY_PADDING = -2, -1


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"] | None,
    key_segments: Int[Array, "B M"] | None,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Computes `reference.attention` by cuDNN through `jax.nn.dot_product_attention`.

    Segments are passed as a mask, because cuDNN ignores them otherwise. cuDNN takes a mask only for even lengths, so
    odd ones are padded by one position.
    """
    mesh = mesh_in_context()
    if mesh is not None and mesh.manual_axes:
        # cuDNN's own partitioning knows no mesh of which a shard_map has taken an axis.
        if query_segments is None or key_segments is None:
            query_segments, key_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (query, key))
        own = functools.partial(_attention, causal=causal)
        return on_own_rows_and_heads(own, mesh, query, key, value, query_segments, key_segments)
    return _attention(query, key, value, query_segments, key_segments, causal=causal)


def _attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    query_segments: Int[Array, "B N"] | None,
    key_segments: Int[Array, "B M"] | None,
    *,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Calls cuDNN."""
    length, mask = query.shape[1], None
    if query_segments is not None and key_segments is not None:
        query, query_segments = _even(query), _even(query_segments, _QUERY_PADDING)
        key, value, key_segments = _even(key), _even(value), _even(key_segments, _KEY_PADDING)
        mask = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    # `is_causal` beside the mask lets cuDNN skip the blocks above the diagonal.
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    return attended[:, :length]


def _even(x: Array, fill: int = 0) -> Array:
    """Appends one position along the second axis where their number is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
