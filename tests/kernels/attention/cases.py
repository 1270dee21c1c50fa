"""Packed rows for the tests of attention, and the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.noise import assert_within_noise, float64
from vr_jax.kernels.attention import reference

Attention = Callable[..., jax.Array]


@dataclass(frozen=True)
class Case:
    """Two rows of two and three segments with padding, grouped queries.

    Attributes:
        causal: Whether a query attends only to keys whose index is at most its own.
        extra_keys: Keys behind those of the row, as text-guided tokens are; the third matches no query.
        lengths: Queries and keys of a row.
        width: Channels of a head.
        dtype: The type of the arrays.
    """

    causal: bool = False
    extra_keys: int = 0
    lengths: tuple[int, int] = (137, 137)
    width: int = 8
    dtype: str = "float32"

    def arrays(self) -> dict[str, Any]:
        """Returns the arguments of `attention`, as numbers that `dtype` holds exactly, and the loss's weights."""
        rng = np.random.default_rng(0)
        queries, keys = self.lengths
        segments = np.array([[1] * 9 + [2] * 120 + [0] * 9, [1] * 5 + [2] * 25 + [3] * 108])
        extra = np.tile([1, 2, -1][: self.extra_keys], (2, 1)).astype(int)
        key_segments = np.concatenate([segments[:, :keys], extra], axis=1)
        shape = (2, key_segments.shape[1], 2, self.width)
        query, key, value, weight = (
            jnp.asarray(rng.normal(size=s), self.dtype)
            for s in ((2, queries, 4, self.width), shape, shape, (2, queries, 4, self.width))
        )
        query_segments = segments[:, :queries]
        # Outputs of padding are unspecified and enter no loss.
        weight = weight * (query_segments > 0)[..., None, None]
        return {
            "arrays": (query, key, value),
            "segments": (jnp.asarray(query_segments), jnp.asarray(key_segments)),
            "weight": weight,
        }


def value_and_gradients(attend: Attention, case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the output where it is specified, and the gradients of its weighted sum by query, key and value."""
    query_segments, key_segments = arrays["segments"]

    @jax.jit
    def run(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(*qkv, query_segments=query_segments, key_segments=key_segments, causal=case.causal)
            return jnp.sum(out * arrays["weight"]), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return out, gradients

    out, gradients = run(*arrays["arrays"])
    assert np.isfinite(np.asarray(out, np.float32)).all()
    real = np.asarray(query_segments) > 0
    return {"out": np.asarray(out)[real], **dict(zip(("query", "key", "value"), gradients, strict=True))}


@functools.cache
def exact(case: Case) -> dict[str, Any]:
    """Returns `value_and_gradients` of the reference in float64, for the numbers of `case.dtype`."""
    with float64():
        arrays = case.arrays()
        widened = {
            "arrays": tuple(np.asarray(x, np.float64) for x in arrays["arrays"]),
            "segments": arrays["segments"],
            "weight": np.asarray(arrays["weight"], np.float64),
        }
        found = value_and_gradients(reference.attention, case, widened)
        return {name: np.asarray(x) for name, x in found.items()}


@functools.cache
def plain(case: Case) -> dict[str, Any]:
    """Returns `value_and_gradients` of the reference in the type of the case."""
    return value_and_gradients(reference.attention, case, case.arrays())


def check(attend: Attention, case: Case) -> None:
    """Fails if values or gradients are further from float64 than the reference's noise allows."""
    found = value_and_gradients(attend, case, case.arrays())
    assert_within_noise(found, exact(case), plain(case))


@functools.cache
def without_masks() -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Returns arrays without segments, each of four heads; the reference's result in float64; and that in float32."""
    arrays = tuple(jnp.repeat(x, 4 // x.shape[2], axis=2) for x in Case().arrays()["arrays"])
    run = jax.jit(functools.partial(reference.attention, query_segments=None, key_segments=None, causal=False))
    with float64():
        exact = np.asarray(run(*(np.asarray(x, np.float64) for x in arrays)))
    return arrays, exact, run(*arrays)
