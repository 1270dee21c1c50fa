"""How likely a model finds given replies, for lmms-eval's tasks with choices."""

from __future__ import annotations

import dataclasses
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

NOTHING = -1  # target of a position that counts for nothing


class Likelihood:
    """Mean negative log-probability of a reply, its end included, as LLaVA's loss over `<reply><|im_end|>\\n`.

    lmms-eval documents a log-probability but takes the *smallest* value as the choice (`Task.process_results`),
    because its LLaVA classes return this loss; so does this. "greedy" means that every token of the reply and its
    <|im_end|> is the most probable one (lmms-eval's LLaVA compares with the tokens one position off)."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self._rows = jax.jit(_rows)

    def check(self) -> None:
        """Raises UserError for a model with a pruner: what it drops depends on the last token of the prompt, here
        the reply's."""
        if self.model.config.pruning is not None:
            raise UserError(
                f"likelihoods with the pruner {self.model.config.pruning.name!r} are not defined: "
                "leave pruning out, or choose tasks that generate"
            )

    def tokens(self, processor: Processor, reply: str) -> list[int]:
        """The tokens after the assistant header, up to <|im_end|> and the newline behind it."""
        return processor.encoder.tokenizer.encode(f"{reply}<|im_end|>\n", add_special_tokens=False).ids

    def __call__(
        self, replies: Sequence[tuple[Example, Sequence[int]]], rows: int, buckets: Buckets
    ) -> list[tuple[float, bool]]:
        """(loss, greedy) of each prompt and its reply's tokens; at most `rows` of them. Raises PromptTooLong."""
        image = self.model.config.image
        longest = max(len(tokens) for _, tokens in replies)
        whole = [_extended(prompt, tokens) for prompt, tokens in replies]
        tokens, tiles = buckets.fit(
            max(len(example.tokens) for example in whole),
            max(1, *(len(example.tile_pixels) for example in whole)),
        )
        width = min(1 << (longest - 1).bit_length(), tokens - 1)  # few shapes; a prompt has a token at least
        shape = BatchShape(rows=rows, tokens=tokens, tiles=tiles, tile_size=image.tile_size)
        batch = collate([[one] for one in whole], shape, pad_side="left", weighted_cells=image.may_interpolate).batch
        targets = np.full((rows, width), NOTHING, np.int32)
        for row, (_, reply) in enumerate(replies):
            targets[row, -len(reply) :] = reply
        mesh = jax.sharding.get_mesh()
        placed = jax.device_put((batch, targets), None if mesh.empty else batch_sharding(mesh))
        losses, greedy = jax.device_get(self._rows(self.model, *placed))
        return [(float(losses[row]), bool(greedy[row])) for row in range(len(replies))]


def _extended(prompt: Example, reply: Sequence[int]) -> Example:
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
    )


def _rows(
    model: VisionLanguageModel, batch: Batch, targets: Int[Array, "B C"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """targets: what the last C tokens of each row must be, NOTHING where it does not matter.

    The last one is the newline behind <|im_end|>, which `greedy` leaves out: generation ends before it."""
    hidden, _ = model(batch)
    width = targets.shape[1]

    def position(args: tuple[Array, Array]) -> tuple[Array, Array]:
        """One position at a time: the logits of all would be C times a vocabulary per row."""
        state, target = args
        logits = model.logits(state)
        picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == target

    before = jnp.moveaxis(hidden[:, -width - 1 : -1], 1, 0)
    losses, equal = jax.lax.map(position, (before, targets.T))
    counts = targets.T != NOTHING
    loss = jnp.sum(jnp.where(counts, losses, 0), axis=0) / jnp.maximum(jnp.sum(counts, axis=0), 1)
    return loss, jnp.all(equal[:-1] | ~counts[:-1], axis=0)
