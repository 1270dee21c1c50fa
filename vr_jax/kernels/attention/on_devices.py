"""Runs attention on each device's own rows and heads, for kernels that XLA does not partition."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vr_jax.sharding import activation_spec

OneDevice = Callable[[Array, Array, Array, Array, Array], Array]


def on_own_rows_and_heads(
    attention: OneDevice,
    mesh: AbstractMesh,
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    query_segments: Int[Array, "B N"],
    key_segments: Int[Array, "B M"],
) -> Float[Array, "B N H K"]:
    """Computes attention in a shard_map.

    Args:
        attention: Computes it on one device, from query, key, value and both segments.
        mesh: The mesh in context.
        query: The queries.
        key: The keys. Where there are fewer key heads than devices along `tensor`, each query head gets a copy.
        value: The values, likewise.
        query_segments: The segments of the queries.
        key_segments: The segments of the keys.
    """
    spec = activation_spec(query.shape, "batch", "seq", "heads", None, mesh=mesh)
    key_spec = activation_spec(key.shape, "batch", "seq", "kv_heads", None, mesh=mesh)
    if key_spec != spec:
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        key_spec = spec
    rows = P(spec[0], None)
    mapped = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(spec, key_spec, key_spec, rows, rows),
        out_specs=spec,
        check_vma=False,
    )
    attended: Array = mapped(query, key, value, query_segments, key_segments)
    return attended
