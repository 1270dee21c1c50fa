"""Choosing the next token: greedy, temperature and nucleus (top-p) sampling."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vr_jax.fields import Config, PositiveFraction, Seed, Temperature, check

# Logits that are divided by less are no longer told apart from infinity.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling(Config):
    """Settings of the choice of the next token. The same seed gives the same tokens.

    Attributes:
        temperature: The logits are divided by it; 0 is greedy decoding.
        top_p: Only the smallest set of most probable tokens whose probabilities together reach it is drawn from.
        seed: The seed of the random draws.

    Raises:
        ConfigError: A number is outside its range.
    """

    temperature: Temperature = 0.0
    top_p: PositiveFraction = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.temperature == 0 or self.temperature >= MIN_TEMPERATURE,
            f"Sampling.temperature = {self.temperature}: expected 0 for greedy decoding, or at least {MIN_TEMPERATURE}",
        )


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """Sorts logits and masks those outside the nucleus.

    A token belongs to the nucleus if the tokens before it hold less than `top_p` of the probability, so the most
    probable one always does. Of equal logits, that of the lower token id comes first.
    Source: Holtzman et al. 2020 (arXiv 1904.09751); the set is that of transformers' `TopPLogitsWarper`.

    Args:
        logits: Logits by token id.
        top_p: The probability that the nucleus must reach.

    Returns:
        The logits in descending order, -inf outside the nucleus, and the token id of each.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Where top_p is 1, rounding of the sum must not cut the tail.
    kept = (before < top_p) | (top_p >= 1)
    return jnp.where(kept.at[..., 0].set(True), ranked, -jnp.inf), order


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, " B"]:
    """Chooses the next token of each row.

    Greedy decoding is a program of its own, because a choice on the device would make a GPU wait for the host at every
    token. Other temperatures are traced, so that another temperature or `top_p` compiles nothing.

    Args:
        logits: Logits by row and token id.
        keys: One key for each row, so that a row's draw does not depend on the other rows.
        temperature: The temperature, or None for greedy decoding.
        top_p: The probability of the nucleus, or None for greedy decoding.

    Returns:
        The token ids.
    """
    if temperature is None or top_p is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    ranked, order = nucleus(logits / temperature, top_p)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
