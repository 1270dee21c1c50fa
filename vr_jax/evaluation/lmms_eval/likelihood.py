"""The likelihood of given replies, for the tasks of lmms-eval that choose among options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.data.collate import collate
from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.errors import UserError
from vr_jax.inference import Buckets
from vr_jax.model.batch import NO_CELL, Batch, BatchShape
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.sharding import batch_sharding

NOTHING = -1  # The target of a position that does not count.


class Likelihood:
    r"""The mean negative log-probability of a reply and what closes it.

    In ChatML this is LLaVA's loss over `<reply><|im_end|>\n`.

    lmms-eval documents that a model returns a log-probability, but it chooses the option with the *smallest* value
    (`Task.process_results`), because its LLaVA classes return this loss. This class does the same. A reply is "greedy"
    if each of its tokens and its end token is the most probable one. (The LLaVA classes of lmms-eval compare with
    tokens that are shifted by one position.)
    """

    def __init__(self, model: VisionLanguageModel, behind_end: int = 1):
        """Prepares a model.

        Args:
            model: The model.
            behind_end: How many tokens of a closed reply stand behind the one that ends it (`ChatEncoder.reply`).
        """
        self.model = model
        self._rows = jax.jit(functools.partial(_rows, behind_end=behind_end))

    def check(self) -> None:
        """Checks that likelihoods are defined for the model.

        Raises:
            UserError: The model has a pruner. What a pruner drops depends on the last token of the prompt, which here
                would be a token of the reply.
        """
        if self.model.config.pruning is not None:
            raise UserError(
                f"likelihoods are not defined with the pruner {self.model.config.pruning.name!r}; leave pruning out, "
                "or choose tasks that generate text"
            )

    def tokens(self, processor: Processor, reply: str) -> list[int]:
        """Returns the tokens of a reply with what closes it; in ChatML these are <|im_end|> and a newline."""
        tokens, _ = processor.encoder.reply(reply)
        return tokens

    def __call__(
        self, replies: Sequence[tuple[Example, Sequence[int]]], rows: int, buckets: Buckets
    ) -> list[tuple[float, bool]]:
        """Computes the likelihoods of one batch.

        Args:
            replies: Pairs of a prompt and the tokens of its reply, at most `rows`.
            rows: The number of rows of the batch.
            buckets: The static sizes that rows are padded to.

        Returns:
            The loss of each pair, and whether it is greedy.

        Raises:
            PromptTooLong: A prompt with its reply exceeds the largest bucket.
        """
        config = self.model.config
        longest = max(len(tokens) for _, tokens in replies)
        whole = [_extended(prompt, tokens) for prompt, tokens in replies]
        tokens, tiles = buckets.fit(
            max(len(example.tokens) for example in whole),
            max(1, *(len(example.tile_pixels) for example in whole)),
        )
        # The number of scored positions is rounded up to a power of two, so that few shapes are compiled. A prompt has
        # at least one token, which is not scored.
        width = min(1 << (longest - 1).bit_length(), tokens - 1)
        shape = BatchShape(rows=rows, tokens=tokens, tiles=tiles, tile_size=config.image.tile_size)
        batch = collate([[one] for one in whole], shape, pad_side="left", optional=config.batch_fields).batch
        targets = np.full((rows, width), NOTHING, np.int32)
        for row, (_, reply) in enumerate(replies):
            targets[row, -len(reply) :] = reply
        mesh = jax.sharding.get_mesh()
        placed = jax.device_put((batch, targets), None if mesh.empty else batch_sharding(mesh))
        losses, greedy = jax.device_get(self._rows(self.model, *placed))
        return [(float(losses[row]), bool(greedy[row])) for row in range(len(replies))]


def _extended(prompt: Example, reply: Sequence[int]) -> Example:
    """Returns the prompt with the tokens of the reply behind it."""

    def more(array: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate([array, np.full((len(reply), *array.shape[1:]), value, array.dtype)])

    return dataclasses.replace(
        prompt,
        tokens=np.append(prompt.tokens, np.asarray(reply, np.int32)),
        loss_mask=more(prompt.loss_mask, False),
        text_token_mask=more(prompt.text_token_mask, False),
        vision_cell=more(prompt.vision_cell, NO_CELL),
        vision_cells=None if prompt.vision_cells is None else more(prompt.vision_cells, 0),
        vision_weights=None if prompt.vision_weights is None else more(prompt.vision_weights, 0),
        positions=None if prompt.positions is None else _counted_on(prompt.positions, len(reply)),
    )


def _counted_on(positions: Int[np.ndarray, "n 3"], count: int) -> Int[np.ndarray, "m 3"]:
    """Returns the positions of a prompt, and those of `count` text tokens behind it."""
    behind = positions[-1].max() + np.arange(1, count + 1, dtype=positions.dtype)
    return np.concatenate([positions, np.repeat(behind[:, None], 3, axis=1)])


def _rows(
    model: VisionLanguageModel, batch: Batch, targets: Int[Array, "B C"], *, behind_end: int
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Computes the loss of each row, and whether it is greedy.

    The last targets stand behind the token that ends the reply, in ChatML the newline behind <|im_end|>. They do not
    count for `greedy`, because generation ends before them.

    Args:
        model: The model.
        batch: The prompts with their replies.
        targets: The last C tokens of each row, or NOTHING at positions that do not count.
        behind_end: How many of the last targets stand behind the end.
    """
    hidden, _ = model(batch)
    width = targets.shape[1]

    def position(args: tuple[Array, Array]) -> tuple[Array, Array]:
        """Computes one position at a time, because the logits of all positions would take C times a vocabulary."""
        state, target = args
        logits = model.logits(state)
        picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == target

    before = jnp.moveaxis(hidden[:, -width - 1 : -1], 1, 0)
    losses, equal = jax.lax.map(position, (before, targets.T))
    counts = targets.T != NOTHING
    loss = jnp.sum(jnp.where(counts, losses, 0), axis=0) / jnp.maximum(jnp.sum(counts, axis=0), 1)
    generated = slice(len(targets.T) - behind_end)
    return loss, jnp.all(equal[generated] | ~counts[generated], axis=0)
