"""Self-attention over packed rows, from libraries (design decision 8), behind one function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"],
    key_segments: Int[Array, "B M"],
    causal: bool,
    backend: str = "xla",
) -> Float[Array, "B N H K"]:
    """Scaled dot-product attention in which a query sees the keys of its own segment only (and, if causal, of its own
    index or before). H is a multiple of G: grouped queries. Softmax in float32.

    backend: 'xla' runs everywhere; 'cudnn' (NVIDIA) gets the segments as a mask, because cuDNN through jax.nn would
    otherwise ignore them; 'splash' (TPU) takes segment ids. Rows of segment 0 (padding) hold unspecified finite
    numbers.
    Raises ValueError for an unknown backend."""
    if backend == "splash":
        return _splash(query, key, value, query_segments, key_segments, causal)
    if backend not in ("xla", "cudnn"):
        raise ValueError(f"attention backend {backend!r}: expected 'xla', 'cudnn' or 'splash'")
    mask = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones(mask.shape[-2:], bool))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=backend)  # type: ignore[call-overload]


def cached_attention(
    query: Float[Array, "B 1 H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B 1 H K"]:
    """One new token per row against its cache."""
    return jax.nn.dot_product_attention(query, key, value, mask=valid[:, None, None, :], implementation="xla")


def _splash(query, key, value, query_segments, key_segments, causal):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, keys = query.shape[1], key.shape[1]
    block = 128
    pad_query, pad_key = -length % block, -keys % block

    def padded(x, pad, fill=0):
        return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    query, query_segments = padded(query, pad_query), padded(query_segments, pad_query)
    key, value = padded(key, pad_key), padded(value, pad_key)
    key_segments = padded(key_segments, pad_key, -1)  # matches no query
    shape = (length + pad_query, keys + pad_key)
    one = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    groups = key.shape[2]
    kernel = _splash_kernel(splash.MultiHeadMask([one] * query.shape[2]), jax.default_backend() != "tpu")
    scale = query.shape[-1] ** -0.5

    def row(q, k, v, qs, ks):
        repeat = q.shape[1] // groups
        k, v = (jnp.repeat(x.swapaxes(0, 1), repeat, axis=0) for x in (k, v))
        return kernel(q.swapaxes(0, 1) * scale, k, v, splash.SegmentIds(q=qs, kv=ks)).swapaxes(0, 1)

    return jax.vmap(row)(query, key, value, query_segments, key_segments)[:, :length]


def _splash_kernel(mask: Any, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    return make(mask)
