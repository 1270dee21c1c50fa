"""Self-attention over packed rows behind one function: from libraries (design decision 8), except on one CPU, for which
none is fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.kernels.attention.blocked import blocked_attention
from vr_jax.sharding import activation_spec, mesh_in_context, platform

BLOCKED_FROM = 512  # positions of a row from which the CPU's blocks pay; shorter rows compile faster without
SPLASH_BLOCK = 512  # positions per block of the TPU kernel; larger is faster until it does not fit in VMEM


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"],
    key_segments: Int[Array, "B M"],
    causal: bool,
    backend: str = "auto",
) -> Float[Array, "B N H K"]:
    """Scaled dot-product attention in which a query sees the keys of its own segment only (and, if causal, of its own
    index or before). H is a multiple of G: grouped queries. Softmax in float32.

    backend: 'xla' runs everywhere; 'cudnn' (NVIDIA) gets the segments as a mask, because cuDNN through jax.nn would
    otherwise ignore them; 'splash' (TPU) takes segment ids; 'blocked' is for long rows on one CPU; 'auto' is the one
    that suits the platform. Rows of segment 0 (padding) hold unspecified finite numbers.
    Raises ValueError for an unknown backend."""
    backend = _choose(backend, query, key)
    if backend == "splash":
        return _splash(query, key, value, query_segments, key_segments, causal)
    if backend == "blocked":
        return blocked_attention(
            query, key, value, query_segments=query_segments, key_segments=key_segments, causal=causal
        )
    length = query.shape[1]
    if backend == "cudnn":
        # Beside a mask it takes even lengths only. -1 and -2 match nothing that is read.
        query, query_segments = _even(query), _even(query_segments, -2)
        key, value, key_segments = _even(key), _even(value), _even(key_segments, -1)
    mask = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    # is_causal beside the mask lets cuDNN skip the blocks above the diagonal.
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation=backend)  # type: ignore[call-overload]
    return attended[:, :length]


def _even(x: jax.Array, fill: int = 0) -> jax.Array:
    """One more position where their number is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)


def full_attention(
    query: Float[Array, "M P H K"], key: Float[Array, "M P H K"], value: Float[Array, "M P H K"], backend: str = "auto"
) -> Float[Array, "M P H K"]:
    """Attention in which every query sees every key, for rows of a few hundred positions (the encoder's tiles).

    backend: as in `attention`; the TPU's is XLA here too, because splash pads such rows to twice their length."""
    backend = _choose(backend, query, key)
    if backend == "blocked":
        return blocked_attention(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if backend == "cudnn" else "xla")


def _choose(backend: str, query: Float[Array, "B N H K"], key: Float[Array, "B M G K"]) -> str:
    if backend in ("xla", "cudnn", "splash", "blocked"):
        return backend
    if backend != "auto":
        raise ValueError(f"attention backend {backend!r}: expected 'auto', 'xla', 'cudnn', 'splash' or 'blocked'")
    if platform() == "tpu":
        return "splash"
    if platform() == "cpu":
        mesh = mesh_in_context()
        return "blocked" if (mesh is None or mesh.size == 1) and query.shape[1] >= BLOCKED_FROM else "xla"
    # cuDNN's limits: half precision, heads of at most 128 channels (256 since Hopper).
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform() == "gpu" and half and fits else "xla"


def cached_attention(
    query: Float[Array, "B 1 H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B 1 H K"]:
    """One new token per row against its cache. Softmax in float32.

    Not `jax.nn.dot_product_attention`, which takes heads after slots: XLA's program for CPUs then transposes the cache
    for every token (docs/results/speed.md)."""
    grouped = query.reshape(*key.shape[:2], -1, query.shape[-1])
    if platform() == "cpu":
        # XLA's CPU product of a few rows with the transpose of a long matrix takes more than twice as long.
        rows, slots = grouped.astype(jnp.float32)[:, :, :, None], key.astype(jnp.float32)[:, :, None]
        logits = jnp.sum(rows * slots, axis=-1)
    else:
        logits = jnp.einsum("bghk,bgsk->bghs", grouped, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min), axis=-1)
    read = jnp.einsum("bghs,bgsk->bghk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return read.astype(query.dtype).reshape(query.shape)


def _splash(query, key, value, query_segments, key_segments, causal):
    """Pallas calls are not partitioned by XLA: on a mesh each device runs the kernel on its rows and heads."""
    mesh = mesh_in_context()
    if mesh is None:
        return _splash_rows(query, key, value, query_segments, key_segments, causal)
    spec = activation_spec(query.shape, "batch", "seq", "heads", None, mesh=mesh)
    key_spec = activation_spec(key.shape, "batch", "seq", "kv_heads", None, mesh=mesh)
    if key_spec != spec:  # fewer key heads than devices: each query head brings its own
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        key_spec = spec
    segment_spec = P(spec[0], None)
    return jax.shard_map(
        functools.partial(_splash_rows, causal=causal),
        mesh=mesh,
        in_specs=(spec, key_spec, key_spec, segment_spec, segment_spec),
        out_specs=spec,
        check_vma=False,
    )(query, key, value, query_segments, key_segments)


def _splash_rows(query, key, value, query_segments, key_segments, causal):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second: only where it is used

    length, keys = query.shape[1], key.shape[1]
    (query_block, query_length), (key_block, key_length) = (_blocks(n) for n in (length, keys))

    def padded(x, to, fill=0):
        return jnp.pad(x, ((0, 0), (0, to - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    # The kernel does not scale, and wants heads before positions.
    query = padded(query * query.shape[-1] ** -0.5, query_length).swapaxes(1, 2)
    key, value = (padded(x, key_length).swapaxes(1, 2) for x in (key, value))
    segments = splash.SegmentIds(
        q=padded(query_segments, query_length),
        kv=padded(key_segments, key_length, -1),  # matches no query that is read
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
    return jax.vmap(kernel)(query, key, value, segments).swapaxes(1, 2)[:, :length]


def _blocks(length: int) -> tuple[int, int]:
    """Block size, and the length that blocks fill. The kernel takes multiples of 128."""
    block = min(SPLASH_BLOCK, -(-length // 128) * 128)
    return block, -(-length // block) * block
