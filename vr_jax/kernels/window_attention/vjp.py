"""A kernel of one device as a differentiable function on any mesh: its gradient, and the shard_map around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from vr_jax.sharding import activation_spec, mesh_in_context

Shaped = Array | jax.ShapeDtypeStruct


def dtype_refusal(*arrays: Shaped) -> str | None:
    """What every kernel says of arrays that are not all float32 or all bfloat16; None of others."""
    dtypes = {jnp.dtype(x.dtype) for x in arrays}
    if len(dtypes) == 1 and dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return None
    return f"dtypes {sorted(d.name for d in dtypes)}, expected one of float32 and bfloat16 for all"


class Specs(NamedTuple):
    """How a mesh cuts the arrays: windows over the batch axes, heads over `tensor`, where they divide."""

    query: P  # also of the output, the weights and their gradient
    key: P
    valid: P


def partition(query: Shaped, key: Shaped, mesh: AbstractMesh) -> Specs:
    """Windows are flattened from (rows, tiles, cells), so pieces of W are pieces of the batch where that divides."""
    spec = activation_spec(query.shape, "batch", "heads", None, mesh=mesh)
    heads = spec[1] if key.shape[2] > 1 else None
    return Specs(spec, P(spec[0], None, heads, None), P(spec[0], None))


@dataclass(frozen=True)
class Kernel:
    """`module.forward` and `module.query_gradient` (pallas_tpu.py, pallas_gpu.py) as one function with a gradient.

    The softmax is recomputed in the backward pass. The gradients of key and value are XLA's products of the kernel's
    weights, which XLA removes where nobody asks for them (the encoder is frozen). For the plain form, whose keys are
    projected by weights that learn, a module may have `gradients`, which makes all three."""

    module: ModuleType
    scale: float
    interpret: bool

    def __call__(
        self,
        query: Float[Array, "W H d"],
        key: Float[Array, "W S K d"],
        value: Float[Array, "W S K dv"] | None,
        valid: Bool[Array, "W S"] | None,
    ) -> Float[Array, "W H dv"]:
        """value None: the keys are the values."""
        return _attend(self, query, key, value, valid)

    def forward(self, query, key, value, valid):
        def local(query, key, value, valid):
            value = key if value is None else value
            return self.module.forward(query, key, value, valid, self.scale, interpret=self.interpret)

        return _per_device(local, "q", query, key, value, valid)[0]

    def gradients(self, query, key, value, valid, grad):
        """By query, key and value; value None: the keys' is for both."""
        fused = key.shape[2] > 1 and hasattr(self.module, "gradients")

        def local(query, key, value, valid, grad):
            value = key if value is None else value
            function = self.module.gradients if fused else self.module.query_gradient
            return function(query, key, value, valid, grad, self.scale, interpret=self.interpret)

        found = _per_device(local, "qkv" if fused else "qqq", query, key, value, valid, grad)
        if fused:
            query_grad, key_grad, value_grad = found
        else:
            query_grad, weights, logits_grad = found
            key_grad = _spread(logits_grad, query, key)
            value_grad = _spread(weights, grad, key if value is None else value)
        if value is None:
            return query_grad, (key_grad + value_grad).astype(key.dtype), None
        return query_grad, key_grad.astype(key.dtype), value_grad.astype(value.dtype)


def _spread(weights: Float[Array, "W H S"], rows: Float[Array, "W H d"], like: Float[Array, "W S K d"]) -> Array:
    """Each key's sum of the rows, weighted; float32."""
    heads = "h" if like.shape[2] > 1 else ""
    product = jnp.einsum(f"whs,whd->ws{heads}d", weights.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
    return product.reshape(like.shape)


def _per_device(
    function: Callable,
    results: str,
    query: Array,
    key: Array,
    value: Array | None,
    valid: Array | None,
    grad: Array | None = None,
) -> tuple[Array, ...]:
    """`function` of each device's part: XLA does not partition Pallas calls.

    results: for each, q if it is cut as the query, k or v if as keys and values."""
    mesh = mesh_in_context()
    extra = () if grad is None else (grad,)
    if mesh is None:
        found = function(query, key, value, valid, *extra)
        return found if isinstance(found, tuple) else (found,)
    specs = partition(query, key, mesh)
    per_window, shared_by_heads = key.shape[1], key.shape[2] == 1

    # Keys cross the border as rows: in their own shape XLA would lay them out anew, with S padded to a tile of 8 or 16.
    def as_rows(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(-1, x.shape[2] * x.shape[3])

    def local(query, key, value, valid, *extra):
        heads = 1 if shared_by_heads else query.shape[1]
        key, value = (
            None if x is None else x.reshape(-1, per_window, heads, x.shape[1] // heads) for x in (key, value)
        )
        found = function(query, key, value, valid, *extra)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(x if kind == "q" else as_rows(x) for kind, x in zip(results, found, strict=True))

    rows = P(specs.key[0], specs.key[2])
    # An absent array (None) is an empty tree, its spec a prefix of it.
    in_specs = (specs.query, rows, rows, specs.valid, *[specs.query] * len(extra))
    out_specs = tuple(specs.query if kind == "q" else rows for kind in results)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    found = mapped(query, as_rows(key), as_rows(value), valid, *extra)
    shapes = {"k": key.shape, "v": key.shape if value is None else value.shape}
    return tuple(x if kind == "q" else x.reshape(shapes[kind]) for kind, x in zip(results, found, strict=True))


_Saved = tuple[Array, Array, Array | None, Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, query: Array, key: Array, value: Array | None, valid: Array | None) -> Array:
    return kernel.forward(query, key, value, valid)


def _attend_forward(
    kernel: Kernel, query: Array, key: Array, value: Array | None, valid: Array | None
) -> tuple[Array, _Saved]:
    return kernel.forward(query, key, value, valid), (query, key, value, valid)


def _attend_backward(kernel: Kernel, saved: _Saved, grad: Array) -> tuple[Array, Array, Array | None, None]:
    return *kernel.gradients(*saved, grad), None


_attend.defvjp(_attend_forward, _attend_backward)
