"""What changes the logits before a token is chosen, as the logits processors of transformers do.

Source: transformers `generation/logits_process.py`; the order is that of `_get_logits_processor` in
`generation/utils.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model_directory import GenerationSettings


def process_logits(
    logits: Float[Array, "B V"],
    settings: GenerationSettings,
    stop_ids: tuple[int, ...],
    step: Int[Array, ""],
    occurred: Bool[Array, "B V"] | None,
) -> Float[Array, "B V"]:
    """Returns the logits that the next token is chosen by.

    Args:
        logits: The logits of the model.
        settings: What is changed.
        stop_ids: The tokens that end a reply.
        step: The number of tokens that the reply has already.
        occurred: Whether a token occurred; None without a repetition penalty.
    """
    size = logits.shape[-1]
    if occurred is not None:
        penalty = settings.repetition_penalty
        logits = jnp.where(occurred, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if settings.min_new_tokens:
        early = step < settings.min_new_tokens
        logits = jnp.where(early & _members(stop_ids, size), -jnp.inf, logits)
    if settings.suppress_tokens:
        logits = jnp.where(_members(settings.suppress_tokens, size), -jnp.inf, logits)
    if settings.begin_suppress_tokens:
        logits = jnp.where((step == 0) & _members(settings.begin_suppress_tokens, size), -jnp.inf, logits)
    return logits


def occurred_in_prompt(batch: Batch, size: int, image_token: int | None) -> Bool[Array, "B V"]:
    """Returns which tokens of the vocabulary occurred in the prompts, as the repetition penalty counts them.

    transformers' classes of LLaVA give `generate` the ids of the prompt, in which the image token stands for vision
    tokens. LLaVA's own code gives it embeddings, so that only the tokens of the reply count.

    Args:
        batch: The prompts.
        size: The size of the vocabulary.
        image_token: The id of the image token, or None for a model of LLaVA's code.
    """
    rows = batch.tokens.shape[0]
    occurred = jnp.zeros((rows, size), bool)
    if image_token is None:
        return occurred
    inside = batch.segment_ids > 0
    ids = jnp.where(batch.vision_cell == NO_CELL, batch.tokens, image_token)
    # An id beyond the vocabulary is dropped.
    return occurred.at[jnp.arange(rows)[:, None], jnp.where(inside, ids, size)].set(True, mode="drop")


def with_token(occurred: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """Returns the tokens that occurred after one more token of each row."""
    return occurred.at[jnp.arange(len(token)), token].set(True, mode="drop")


def _members(ids: tuple[int, ...], size: int) -> Bool[Array, " V"]:
    """Marks some ids of the vocabulary; those that do not exist, of stop tokens that are to be ignored, mark none."""
    chosen = jnp.asarray([number for number in ids if 0 <= number < size], jnp.int32)
    return jnp.zeros(size, bool).at[chosen].set(True)
