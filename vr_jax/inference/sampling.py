"""Choosing the next token: greedy, temperature and nucleus (top-p) sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p keeps the smallest set of most probable tokens whose
    probabilities (after the temperature) reach top_p. The same seed gives the same tokens.

    Raises ValueError for a negative or non-finite temperature, or top_p outside (0, 1]."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature = {self.temperature}: expected a finite number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected 0 < top_p <= 1")


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """Logits in descending order, -inf outside the nucleus, and the token each belongs to.

    A token belongs to the nucleus if the tokens before it hold less than top_p of the probability, so the most probable
    one always does. Of equals, the lower id comes first.
    Source: Holtzman et al. 2020 (arXiv 1904.09751); the same set as transformers' TopPLogitsWarper."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounding of the sum must not cut the tail when nothing is to be cut.
    kept = (before < top_p) | (top_p >= 1)
    return jnp.where(kept.at[..., 0].set(True), ranked, -jnp.inf), order


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, " B"]:
    """The next token of each row; `keys` are one PRNG key per row, so that a row's draw depends on no other row.

    temperature None is greedy, a program of its own: choosing on the device would make a GPU wait for the host at every
    token. Other temperatures and top_p are traced: changing them compiles nothing."""
    if temperature is None or top_p is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    ranked, order = nucleus(logits / temperature, top_p)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
