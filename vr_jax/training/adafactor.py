"""Adafactor: second moments of matrices kept as one number for each row and each column.

Source: Shazeer and Stern 2018, arXiv 1804.04235, with a learning rate from outside (`relative_step=False` and
`scale_parameter=False` of transformers' Adafactor) and without a first moment. optax's `scale_by_factored_rms` factors
the two largest axes of an array; here the last two are factored, since the axes before them stack layers, heads or
blocks, of which each is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# Added to the squares of the gradients, as in the paper and in transformers.
_EPS = 1e-30


class FactoredMoments(NamedTuple):
    """The second moments of all parameters, by path.

    Attributes:
        step: Number of updates done.
        rows: Of each matrix, the mean over its columns: the parameter's shape without the last axis.
        columns: Of each matrix, the mean over its rows: the parameter's shape without the last axis but one.
        full: The second moments of what is no matrix, in the parameter's shape.
    """

    step: Int[Array, ""]
    rows: dict[str, Array]
    columns: dict[str, Array]
    full: dict[str, Array]


def factors(path: str, shape: Sequence[int]) -> bool:
    """Returns whether a parameter's second moments are kept as rows and columns.

    Biases and norm scales that are stacked over layers are vectors, and so is what has one row or one column.
    """
    return len(shape) >= 2 and min(shape[-2:]) > 1 and not path.endswith((".bias", ".scale"))


def scale_by_adafactor(decay_rate: float, clipping_threshold: float) -> optax.GradientTransformation:
    """Divides gradients by the root of their second moments, and limits the size of the result.

    Args:
        decay_rate: The decay of the moments at update t, counted from 1, is 1 - t ** -decay_rate.
        clipping_threshold: The largest root mean square of the update of a matrix or vector; a larger one is scaled
            down. The matrices and vectors of a stack count one by one.

    Returns:
        A transformation of dictionaries by parameter path.
    """

    def init(params: dict[str, Array]) -> FactoredMoments:
        matrices = {path: leaf for path, leaf in params.items() if factors(path, leaf.shape)}
        return FactoredMoments(
            step=jnp.zeros((), jnp.int32),
            rows={path: jnp.zeros(leaf.shape[:-1], leaf.dtype) for path, leaf in matrices.items()},
            columns={
                path: jnp.zeros((*leaf.shape[:-2], leaf.shape[-1]), leaf.dtype) for path, leaf in matrices.items()
            },
            full={path: jnp.zeros_like(leaf) for path, leaf in params.items() if path not in matrices},
        )

    def update(
        grads: dict[str, Array], state: FactoredMoments, params: dict[str, Array] | None = None
    ) -> tuple[dict[str, Array], FactoredMoments]:
        del params
        step = state.step + 1
        decay = 1.0 - step.astype(jnp.float32) ** -decay_rate
        updates: dict[str, Array] = {}
        rows: dict[str, Array] = {}
        columns: dict[str, Array] = {}
        full: dict[str, Array] = {}
        for path, grad in grads.items():
            squares = jnp.square(grad) + _EPS
            if path in state.rows:
                row = decay * state.rows[path] + (1 - decay) * squares.mean(-1)
                column = decay * state.columns[path] + (1 - decay) * squares.mean(-2)
                rows[path], columns[path] = row, column
                shares = row / row.mean(-1, keepdims=True)
                scaled = grad * jax.lax.rsqrt(shares)[..., None] * jax.lax.rsqrt(column)[..., None, :]
                updates[path] = _limited(scaled, (-2, -1), clipping_threshold)
            else:
                full[path] = decay * state.full[path] + (1 - decay) * squares
                updates[path] = _limited(grad * jax.lax.rsqrt(full[path]), _unit(path, grad), clipping_threshold)
        return updates, FactoredMoments(step, rows, columns, full)

    return optax.GradientTransformation(init, update)


def _unit(path: str, leaf: Array) -> tuple[int, ...]:
    """The axes of one vector, or of one matrix with a single row or column, of a stack."""
    axes = 1 if path.endswith((".bias", ".scale")) else 2
    return tuple(range(-min(axes, leaf.ndim), 0))


def _limited(update: Float[Array, "*shape"], axes: tuple[int, ...], threshold: float) -> Float[Array, "*shape"]:
    """Scales an update down until its root mean square over some axes is at most `threshold`."""
    size = jnp.sqrt(jnp.square(update).mean(axes, keepdims=True))
    return update / jnp.maximum(1.0, size / threshold)
