"""Attention by JAX's splash attention kernel, for TPUs (`jax:jax/experimental/pallas/ops/tpu/splash_attention`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vr_jax.kernels.attention.on_devices import on_own_rows_and_heads
from vr_jax.sharding import mesh_in_context, platform

# Positions per block. Larger blocks are faster until they do not fit into a TPU's VMEM.
BLOCK = 512
# The kernel takes blocks that are multiples of this many positions.
_LANES = 128
# The segment of padded keys, which is no query's.
_KEY_PADDING = -1


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"] | None,
    key_segments: Int[Array, "B M"] | None,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Computes `reference.attention` by the splash kernel.

    XLA does not partition Pallas calls, so on a mesh each device runs the kernel on its own rows and heads.
    """
    if query_segments is None or key_segments is None:
        query_segments, key_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (query, key))
    mesh = mesh_in_context()
    if mesh is None:
        return _attention(query, key, value, query_segments, key_segments, causal=causal)
    own = functools.partial(_attention, causal=causal)
    return on_own_rows_and_heads(own, mesh, query, key, value, query_segments, key_segments)


def _attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    query_segments: Int[Array, "B N"],
    key_segments: Int[Array, "B M"],
    *,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Runs the kernel on one device; elsewhere than on a TPU, in Pallas' interpreter."""
    # The import takes a second and is needed on TPUs only.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, keys = query.shape[1], key.shape[1]
    (query_block, query_length), (key_block, key_length) = (_blocks(n) for n in (length, keys))
    # The kernel does not scale the logits, and takes heads before positions.
    query = _pad(query * query.shape[-1] ** -0.5, query_length).swapaxes(1, 2)
    key, value = (_pad(x, key_length).swapaxes(1, 2) for x in (key, value))
    segments = splash.SegmentIds(
        q=_pad(query_segments, query_length),
        kv=_pad(key_segments, key_length, _KEY_PADDING),
    )
    mask = splash.CausalMask if causal else splash.FullMask
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask((query_length, key_length))] * query.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )
    attended: Array = jax.vmap(kernel)(query, key, value, segments)
    return attended.swapaxes(1, 2)[:, :length]


def _pad(x: Array, length: int, fill: int = 0) -> Array:
    """Pads the second axis to `length` positions."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)


def _blocks(length: int) -> tuple[int, int]:
    """Returns the size of a block, and the length that whole blocks fill."""
    block = min(BLOCK, -(-length // _LANES) * _LANES)
    return block, -(-length // block) * block
