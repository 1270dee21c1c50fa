"""Chooses what computes windowed cross-attention (docs/kernels.md).

reference   XLA, every platform
pallas_tpu  TPUs
pallas_gpu  NVIDIA GPUs since Hopper
"""

from __future__ import annotations

from types import ModuleType

import jax
from jaxtyping import Array, Bool, Float

from vr_jax.errors import ConfigError
from vr_jax.kernels.window_attention import reference
from vr_jax.kernels.window_attention.vjp import ArrayOrShape, Kernel, partition
from vr_jax.sharding import mesh_in_context, part_shape, platform

BACKENDS = ("reference", "pallas_tpu", "pallas_gpu")
# The platform that each kernel runs on.
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}

# The backend that "auto" takes, by platform and form (absorbed: K = 1; plain: K = H). Other platforms take the
# reference, as do shapes that the kernel does not accept. docs/kernels.md has the measurements.
DEFAULTS = {
    ("tpu", "absorbed"): "pallas_tpu",
    ("tpu", "plain"): "pallas_tpu",
}


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
    """Computes softmax(scale * query . key) . value per window, with the softmax in float32.

    On a mesh a kernel runs on each device's windows and heads.

    Args:
        query: One query for each of W windows, in H heads.
        key: The S keys of each window. K is H if each head has its own keys (the plain form), and 1 if the heads share
            them (the absorbed form, docs/design/decisions.md#decision-6).
        value: The values. If the same array is passed as key and value, a kernel reads it once.
        valid: The keys that take part, or None if all do. A window without a valid key gives zeros and zero gradients.
        scale: The factor of the logits; d ** -0.5 if it is absent.
        backend: One of `BACKENDS`, or "auto" (None) for the fastest one on the platform that the program is compiled
            for.
        interpret: Whether a kernel runs in Pallas' interpreter. That works on every platform and is slow, for tests.

    Returns:
        The attended values.

    Raises:
        ValueError: The shapes do not fit each other.
        ConfigError: The backend is unknown, runs on another platform, or does not accept the shapes.
    """
    check_shapes(query, key, value, valid)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name = choose(query, key, value, backend, interpret=interpret)
    if name == "reference":
        return reference.window_attention(query, key, value, valid, scale)
    return Kernel(load_kernel(name), scale, interpret)(query, key, None if value is key else value, valid)


def window_weights(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    valid: Bool[Array, "W S"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "W H S"]:
    """Computes the softmax of `window_attention` in float32, for inspection: the backends do not return it."""
    return reference.window_weights(query, key, valid, query.shape[-1] ** -0.5 if scale is None else scale)


def choose(
    query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape, backend: str | None = None, *, interpret: bool = False
) -> str:
    """Returns the name of the backend that `window_attention` uses for these arrays, or shapes and types.

    Raises:
        ConfigError: The backend is unknown, runs on another platform, or does not accept the shapes.
    """
    if backend in (None, "auto"):
        form = "absorbed" if key.shape[2] == 1 else "plain"
        name = DEFAULTS.get((platform(), form), "reference")
        return name if name == "reference" or _refusal(name, query, key, value) is None else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"window_attention backend {backend!r}: expected one of {['auto', *BACKENDS]}")
    if backend == "reference":
        return backend
    if not interpret and platform() != KERNELS[backend]:
        raise ConfigError(
            f"window_attention backend {backend!r} runs on platform {KERNELS[backend]!r}, this program is for "
            f"{platform()!r}; use 'auto' or 'reference'"
        )
    if (reason := _refusal(backend, query, key, value)) is not None:
        shapes = ", ".join(f"{n} {x.dtype}{list(x.shape)}" for n, x in (("query", query), ("key", key)))
        raise ConfigError(
            f"window_attention backend {backend!r} cannot take {shapes}: {reason}; use 'auto' or 'reference'"
        )
    return backend


def load_kernel(name: str) -> ModuleType:
    """Imports the module of a kernel; each needs its platform's half of Pallas, which takes a second to load."""
    if name == "pallas_tpu":
        from vr_jax.kernels.window_attention import pallas_tpu

        return pallas_tpu
    from vr_jax.kernels.window_attention import pallas_gpu

    return pallas_gpu


def _refusal(name: str, query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape) -> str | None:
    """Returns why a kernel cannot run on one device's part of these arrays, or None if it can."""
    try:
        module = load_kernel(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    arrays = (query, key, value)
    mesh = mesh_in_context()
    if mesh is not None:
        specs = partition(query, key, mesh)
        query, key, value = (
            jax.ShapeDtypeStruct(part_shape(x.shape, spec, mesh), x.dtype)
            for x, spec in zip(arrays, (specs.query, specs.key, specs.key), strict=True)
        )
    reason: str | None = module.unsupported(query, key, value)
    return reason


def check_shapes(query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape, valid: ArrayOrShape | None) -> None:
    """Raises ValueError, with all shapes, if they do not fit each other."""
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
