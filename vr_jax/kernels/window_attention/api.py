"""Windowed cross-attention: each window's single query attends to that window's keys. Here a backend is chosen."""

from __future__ import annotations

import importlib
from types import ModuleType

import jax
from jaxtyping import Array, Bool, Float

from vr_jax.errors import UserError
from vr_jax.kernels.window_attention import reference
from vr_jax.kernels.window_attention.vjp import Kernel, Shaped, partition
from vr_jax.sharding import mesh_in_context, platform

BACKENDS = ("reference", "pallas_tpu", "pallas_gpu")
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # and the platform that runs it

# What "auto" takes, by platform and form (absorbed: K = 1; plain: K = H); the reference elsewhere, and wherever the
# kernel cannot take the shapes. Evidence: docs/kernels.md.
DEFAULTS = {
    ("tpu", "absorbed"): "pallas_tpu",
    ("tpu", "plain"): "pallas_tpu",
}


class BackendError(UserError):
    """A backend that is unknown, or cannot run here or for these arrays; one line for the user."""


def window_attention(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K dv"],
    valid: Bool[Array, "W S"] | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "W H dv"]:
    """softmax(query . key * scale) . value per window, softmax in float32.

    W windows, S keys per window, H heads; K = H (each head its own keys) or 1 (keys shared by the heads, the
    absorbed form; pass one array as key and value and a kernel reads it once). `valid` False hides a key; a window
    without a valid key gives zeros and zero gradients. scale defaults to d ** -0.5.

    backend: "reference" (XLA), "pallas_tpu", "pallas_gpu", or None / "auto": the faster one for the platform and the
    shapes. On a mesh in context a kernel runs on each device's windows and heads. interpret: run the kernel in
    Pallas' interpreter, on any platform (slow, for tests).
    Raises ValueError for shapes that do not fit each other, BackendError for a backend that cannot be taken."""
    _check_shapes(query, key, value, valid)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name = choose(query, key, value, backend, interpret=interpret)
    if name == "reference":
        return reference.window_attention(query, key, value, valid, scale)
    return Kernel(_module(name), scale, interpret)(query, key, None if value is key else value, valid)


def window_weights(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    valid: Bool[Array, "W S"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "W H S"]:
    """The softmax of `window_attention`, float32, to look at: no backend of the forward pass hands it out."""
    return reference.window_weights(query, key, valid, query.shape[-1] ** -0.5 if scale is None else scale)


def choose(query: Shaped, key: Shaped, value: Shaped, backend: str | None = None, *, interpret: bool = False) -> str:
    """The name of the backend that `window_attention` takes; arrays or ShapeDtypeStructs. Raises as it does."""
    if backend in (None, "auto"):
        form = "absorbed" if key.shape[2] == 1 else "plain"
        name = DEFAULTS.get((platform(), form), "reference")
        return name if name == "reference" or _refusal(name, query, key, value) is None else "reference"
    if backend not in BACKENDS:
        raise BackendError(f"window_attention backend {backend!r}: expected one of {['auto', *BACKENDS]}")
    if backend == "reference":
        return backend
    if not interpret and platform() != KERNELS[backend]:
        raise BackendError(
            f"window_attention backend {backend!r} runs on platform {KERNELS[backend]!r}, this program is for "
            f"{platform()!r}; use 'auto' or 'reference'"
        )
    if (reason := _refusal(backend, query, key, value)) is not None:
        shapes = ", ".join(f"{n} {x.dtype}{list(x.shape)}" for n, x in (("query", query), ("key", key)))
        raise BackendError(
            f"window_attention backend {backend!r} cannot take {shapes}: {reason}; use 'auto' or 'reference'"
        )
    return backend


def _refusal(name: str, query: Shaped, key: Shaped, value: Shaped) -> str | None:
    """Why a kernel cannot run on one device's part of these arrays; None if it can."""
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    mesh = mesh_in_context()
    if mesh is None:
        return module.unsupported(query, key, value)
    specs = partition(query, key, mesh)
    local = (
        jax.ShapeDtypeStruct(jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)
        for x, spec in zip((query, key, value), (specs.query, specs.key, specs.key), strict=True)
    )
    return module.unsupported(*local)


def _module(name: str) -> ModuleType:
    """Imported where it is used: each needs its platform's half of Pallas, which takes a second to load."""
    return importlib.import_module(f"vr_jax.kernels.window_attention.{name}")


def _check_shapes(query: Shaped, key: Shaped, value: Shaped, valid: Shaped | None) -> None:
    windows, heads, width = query.shape
    fits = (
        key.shape[0] == value.shape[0] == windows
        and key.shape[1:3] == value.shape[1:3]
        and key.shape[2] in (1, heads)
        and key.shape[3] == width
        and (valid is None or valid.shape == key.shape[:2])
    )
    if not fits:
        found = ", ".join(str(tuple(x.shape)) for x in (query, key, value, valid) if x is not None)
        raise ValueError(
            f"window_attention: shapes {found}; expected query (W, H, d), key (W, S, K, d), value (W, S, K, dv) with "
            "K = H or 1, and valid (W, S)"
        )
