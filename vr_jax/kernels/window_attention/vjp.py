"""Makes a kernel of one device a differentiable function on any mesh."""

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

ArrayOrShape = Array | jax.ShapeDtypeStruct


def dtype_refusal(*arrays: ArrayOrShape) -> str | None:
    """Returns why no kernel takes these arrays, unless all are float32 or all bfloat16; else None."""
    dtypes = {jnp.dtype(x.dtype) for x in arrays}
    if len(dtypes) == 1 and dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return None
    return f"dtypes {sorted(d.name for d in dtypes)}, expected one of float32 and bfloat16 for all"


class Specs(NamedTuple):
    """How a mesh divides the arrays: windows over the batch axes and heads over `tensor`, where they divide.

    Attributes:
        query: The spec of the query, of the output, and of the weights and their gradient.
        key: The spec of keys and values.
        valid: The spec of the mask of valid keys.
    """

    query: P
    key: P
    valid: P


def partition(query: ArrayOrShape, key: ArrayOrShape, mesh: AbstractMesh) -> Specs:
    """Returns the specs of the arrays on a mesh.

    Windows are flattened from (rows, tiles, cells), so pieces of the windows are pieces of the batch.
    """
    spec = activation_spec(query.shape, "batch", "heads", None, mesh=mesh)
    heads = spec[1] if key.shape[2] > 1 else None
    return Specs(spec, P(spec[0], None, heads, None), P(spec[0], None))


@dataclass(frozen=True)
class Kernel:
    """The functions of a kernel's module as one differentiable function.

    The softmax is computed again in the backward pass. The gradients of key and value are XLA's products of the
    kernel's weights; XLA removes them where nobody asks for them, because the encoder is frozen. In the plain form the
    keys are projected by trained weights, so a module may have `gradients`, which computes all three gradients at once.

    Attributes:
        module: A module with the functions `forward`, `query_gradient` and optionally `gradients`.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.
    """

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
        """Computes windowed cross-attention; if `value` is None, the keys are the values."""
        attended: Array = _attend(self, query, key, value, valid)
        return attended

    def forward(self, query: Array, key: Array, value: Array | None, valid: Array | None) -> Array:
        """Runs the kernel's forward pass on each device's part of the arrays."""

        def local(query: Array, key: Array, value: Array | None, valid: Array | None) -> Array:
            value = key if value is None else value
            out: Array = self.module.forward(query, key, value, valid, self.scale, interpret=self.interpret)
            return out

        return _per_device(local, "q", query, key, value, valid)[0]

    def gradients(
        self, query: Array, key: Array, value: Array | None, valid: Array | None, grad: Array
    ) -> tuple[Array, Array, Array | None]:
        """Computes the gradients by query, key and value.

        If `value` is None, the keys are the values: the second gradient is then the sum of both, and the third is None.
        """
        fused = key.shape[2] > 1 and hasattr(self.module, "gradients")

        def local(query: Array, key: Array, value: Array | None, valid: Array | None, grad: Array) -> tuple[Array, ...]:
            value = key if value is None else value
            function = self.module.gradients if fused else self.module.query_gradient
            results: tuple[Array, ...] = function(query, key, value, valid, grad, self.scale, interpret=self.interpret)
            return results

        found = _per_device(local, "qkv" if fused else "qqq", query, key, value, valid, grad)
        if fused:
            query_grad, key_grad, value_grad = found
        else:
            query_grad, weights, logits_grad = found
            key_grad = _weighted_rows(logits_grad, query, key)
            value_grad = _weighted_rows(weights, grad, key if value is None else value)
        if value is None:
            return query_grad, (key_grad + value_grad).astype(key.dtype), None
        return query_grad, key_grad.astype(key.dtype), value_grad.astype(value.dtype)


def _weighted_rows(weights: Float[Array, "W H S"], rows: Float[Array, "W H d"], like: Float[Array, "W S K d"]) -> Array:
    """Returns for each key the weighted sum of its window's rows, float32, in the shape of `like`."""
    heads = "h" if like.shape[2] > 1 else ""
    product = jnp.einsum(f"whs,whd->ws{heads}d", weights.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
    return product.reshape(like.shape)


def _per_device(
    function: Callable[..., Array | tuple[Array, ...]],
    results: str,
    query: Array,
    key: Array,
    value: Array | None,
    valid: Array | None,
    grad: Array | None = None,
) -> tuple[Array, ...]:
    """Calls a function on each device's part of the arrays, because XLA does not partition Pallas calls.

    Args:
        function: Takes query, key, value, valid, and the gradient if there is one.
        results: One letter per result: "q" if it is divided as the query, "k" or "v" if as keys or values.
        query: The queries of all devices.
        key: The keys of all devices.
        value: The values of all devices, or None if they are the keys.
        valid: The mask of valid keys, or None.
        grad: The gradient of the output, in the backward pass.
    """
    mesh = mesh_in_context()
    extra = () if grad is None else (grad,)
    if mesh is None:
        found = function(query, key, value, valid, *extra)
        return found if isinstance(found, tuple) else (found,)
    specs = partition(query, key, mesh)
    per_window, shared_by_heads = key.shape[1], key.shape[2] == 1

    # Keys enter the shard_map as rows. In their own shape XLA would copy them, with S padded to a tile of 8 or 16.
    def as_rows(x: Array) -> Array:
        return x.reshape(-1, x.shape[2] * x.shape[3])

    def local(query: Array, key: Array, value: Array | None, valid: Array | None, *extra: Array) -> tuple[Array, ...]:
        heads = 1 if shared_by_heads else query.shape[1]
        key = key.reshape(-1, per_window, heads, key.shape[1] // heads)
        if value is not None:
            value = value.reshape(-1, per_window, heads, value.shape[1] // heads)
        found = function(query, key, value, valid, *extra)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(x if kind == "q" else as_rows(x) for kind, x in zip(results, found, strict=True))

    rows = P(specs.key[0], specs.key[2])
    # An absent array (None) is an empty tree, whose spec may be anything.
    in_specs = (specs.query, rows, rows, specs.valid, *[specs.query] * len(extra))
    out_specs = tuple(specs.query if kind == "q" else rows for kind in results)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    parts = mapped(query, as_rows(key), None if value is None else as_rows(value), valid, *extra)
    shapes = {"k": key.shape, "v": key.shape if value is None else value.shape}
    return tuple(x if kind == "q" else x.reshape(shapes[kind]) for kind, x in zip(results, parts, strict=True))


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
