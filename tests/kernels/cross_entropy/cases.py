"""Hidden states, targets and masks for the tests of the loss, and the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.noise import float64
from vr_jax.kernels.cross_entropy import reference

ROWS, LENGTH, WIDTH, WORDS = 3, 22, 8, 101


@functools.cache
def problem() -> tuple[jax.Array, ...]:
    """Returns hidden states, kernel, targets and a mask of a third of the positions, none of them in the second row."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, WORDS)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, WORDS, (ROWS, LENGTH)))
    mask = rng.random((ROWS, LENGTH)) < 0.3
    mask[1] = False
    return hidden, kernel, targets, jnp.asarray(mask)


@functools.cache
def value_and_gradients(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the jitted mean loss with its gradients by hidden states and kernel."""

    def mean(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return loss(hidden, kernel, targets, mask) / mask.sum()

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))


def exact(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
    """Returns loss and gradients of the reference in float64."""
    with float64():
        found = value_and_gradients(reference.cross_entropy)(
            np.asarray(hidden, np.float64), np.asarray(kernel, np.float64), np.asarray(targets), np.asarray(mask)
        )
        return jax.tree.map(np.asarray, found)


def plain(*arrays: jax.Array) -> Any:
    """Returns loss and gradients of the reference in float32."""
    return value_and_gradients(reference.cross_entropy)(*arrays)
