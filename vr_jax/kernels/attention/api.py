"""Chooses what computes attention over whole rows (docs/design/decisions.md#decision-11).

The backends are libraries, one for each kind of device. `blocked` is the exception: it is written here, because no
library is fast on CPUs.

    xla      every platform; the default for short rows and on CPUs with several devices
    cudnn    NVIDIA GPUs, in half precision
    splash   TPUs, a Pallas kernel of JAX
    blocked  one CPU device, for long rows
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vr_jax.errors import ConfigError
from vr_jax.kernels.attention import blocked, cudnn, splash, xla
from vr_jax.sharding import mesh_in_context, platform

# Rows of at least this many positions are computed in blocks on a CPU. Shorter rows compile faster without blocks.
BLOCKED_FROM = 512
# cuDNN takes heads of at most this many channels on every GPU that has its attention (256 since Hopper).
CUDNN_MAX_HEAD_WIDTH = 128


class Implementation(Protocol):
    """The signature of a backend's `attention`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        query_segments: Array | None,
        key_segments: Array | None,
        causal: bool,
    ) -> Array:
        """Computes `reference.attention`."""
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": xla.attention,
    "cudnn": cudnn.attention,
    "splash": splash.attention,
    "blocked": blocked.attention,
}
BACKENDS = tuple(IMPLEMENTATIONS)

logger = logging.getLogger("vr_jax.attention")


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
    """Computes scaled dot-product attention over packed rows.

    A query attends to the keys of its own segment only. The softmax is computed in float32.

    Args:
        query: H query heads; H is a multiple of G, and consecutive query heads share a key head.
        key: G key heads.
        value: G value heads.
        query_segments: The segment of each query. Rows of segment 0 (padding) hold unspecified finite numbers.
        key_segments: The segment of each key.
        causal: Whether a query attends only to keys whose index is at most its own.
        backend: One of `BACKENDS`, or "auto" for the fastest one on the platform that the program is compiled for.

    Returns:
        The attended values, in the type of `query`.

    Raises:
        ConfigError: The backend is unknown.
    """
    attend = IMPLEMENTATIONS[choose(query, key, backend)]
    return attend(query, key, value, query_segments=query_segments, key_segments=key_segments, causal=causal)


def full_attention(
    query: Float[Array, "M P H K"],
    key: Float[Array, "M P H K"],
    value: Float[Array, "M P H K"],
    backend: str = "auto",
    segments: Int[Array, "M P"] | None = None,
) -> Float[Array, "M P H K"]:
    """Computes attention in which every query attends to every key, for the few hundred patches of a tile.

    Args:
        query: M independent rows of P positions.
        key: As `query`.
        value: As `query`.
        backend: As in `attention`. "splash" is replaced by "xla": it would pad such rows to twice their length.
        segments: The segment of each position, or None for one segment. A query attends to the keys of its own segment.

    Returns:
        The attended values, in the type of `query`.

    Raises:
        ConfigError: The backend is unknown.
    """
    name = choose(query, key, backend)
    attend = IMPLEMENTATIONS["xla" if name == "splash" else name]
    return attend(query, key, value, query_segments=segments, key_segments=segments, causal=False)


def choose(query: Array | jax.ShapeDtypeStruct, key: Array | jax.ShapeDtypeStruct, backend: str = "auto") -> str:
    """Returns the name of the backend that `attention` uses.

    Args:
        query: The queries (B, N, H, K), or their shape and type.
        key: The keys (B, M, G, K), or their shape and type.
        backend: The requested backend, or "auto".

    Raises:
        ConfigError: The backend is unknown, or it cannot run on the platform.
    """
    if backend in BACKENDS:
        _check_platform(backend, platform())
        return backend
    if backend != "auto":
        expected = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ConfigError(f"attention backend {backend!r}: expected one of {expected}")
    where = platform()
    if where == "tpu":
        return "splash"
    if where == "cpu":
        mesh = mesh_in_context()
        return "blocked" if (mesh is None or mesh.size == 1) and query.shape[1] >= BLOCKED_FROM else "xla"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= CUDNN_MAX_HEAD_WIDTH
    return "cudnn" if where == "gpu" and half and fits else "xla"


@functools.cache  # The warning comes once.
def _check_platform(backend: str, where: str) -> None:
    """Refuses cuDNN where there is no NVIDIA GPU, and says that splash is slow where there is no TPU."""
    if backend == "cudnn" and where != "gpu":
        raise ConfigError(
            f"config.model.attention = 'cudnn' needs an NVIDIA GPU, and the platform is {where!r}; 'auto' chooses what "
            "suits the platform"
        )
    if backend == "splash" and where != "tpu":
        logger.warning(
            "config.model.attention = 'splash' is a kernel for TPUs: on the platform %r Pallas' interpreter runs it, "
            "which is slow; 'auto' chooses what suits the platform",
            where,
        )
