"""Bounds for comparisons in float32 and bfloat16, from a run in float64.

A fixed tolerance passes on the processor it was tuned on and fails on another, whose matrix units add in another order.
Here the bound follows from the rounding errors of a plain implementation on the same processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.model.config import VlmConfig

# How many times larger than the plain implementation's error an error may be. Another order of summation changes the
# error by a factor of two or three; an actual fault changes it by thousands.
MARGIN = 8.0


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Lets JAX compute in float64 within the context."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def float64_model() -> Iterator[None]:
    """Lets the code of a model that asks for float32 by name compute in float64 within the context.

    Norms, softmaxes and positions name `jnp.float32` themselves, so that changing the type of the inputs is not enough.
    """
    with float64(), mock.patch.object(jnp, "float32", jnp.float64), mock.patch.object(np, "float32", np.float64):
        yield


def float64_config(config: VlmConfig) -> VlmConfig:
    """Returns a config whose activations are float64, which a user cannot ask for. Use it within `float64_model`."""
    wide = dataclasses.replace(config)
    object.__setattr__(wide, "dtype", "float64")
    return wide


def in_float64(tree: Any) -> Any:
    """Returns the tree with its floating-point arrays as float64 arrays of numpy, and other arrays unchanged."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else np.asarray(x), tree
    )


def noise(plain: Any, exact: Any) -> Any:
    """Returns for each array of a tree the largest error of the plain implementation, and at least one rounding.

    Args:
        plain: Results of a plain implementation in the type that is tested.
        exact: The same results in float64.
    """

    def largest(plain: Any, exact: Any) -> float:
        rounding = float(jnp.finfo(plain.dtype).eps) * float(np.max(np.abs(exact), initial=0.0))
        error = np.max(np.abs(np.asarray(plain, np.float64) - exact), initial=0.0)
        return max(float(error), rounding)

    return jax.tree.map(largest, plain, exact)


def assert_within_noise(found: Any, exact: Any, plain: Any, margin: float = MARGIN) -> None:
    """Fails where an error exceeds `margin` times the largest error of the plain implementation in the same array.

    Args:
        found: The results that are tested, a tree of arrays.
        exact: The same results in float64.
        plain: Results of a plain implementation in the type of `found`.
        margin: The factor between the errors.
    """
    bounds = noise(plain, exact)
    leaves = (jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), jax.tree.leaves(bounds))
    for (path, one), other, bound in zip(*leaves, strict=True):
        assert one.shape == other.shape, f"{jax.tree_util.keystr(path)}: shapes {one.shape} and {other.shape}"
        np.testing.assert_allclose(
            np.asarray(one, np.float64),
            other,
            rtol=0,
            atol=margin * bound,
            err_msg=f"{jax.tree_util.keystr(path)}: more than {margin:g} times the noise of {bound:.3g}",
        )
