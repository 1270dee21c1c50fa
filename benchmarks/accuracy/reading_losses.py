"""The losses from which the decoder of the comparison on pages learns to read, and its score (`reading_parts`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.reading_rows import PAD_ID, VARIANTS, Rows
from benchmarks.accuracy.training import all_cells
from vr_jax.data.demo.reading import PAGE
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.vlm import VisionLanguageModel

MIXED, NOISE = 0.6, 1.2  # How much the vision tokens are disturbed in the last stage, at most.


def _batch(rows: Rows, numbers: Int[Array, " B"], cells: Int[Array, "B K"]) -> Batch:
    """The rows as the model's input: the text before the image, some of its patches, the text after it."""
    before, after = rows.before[numbers], rows.after[numbers]
    tokens = jnp.concatenate([before, jnp.zeros_like(cells), after], axis=1)
    used = tokens != PAD_ID
    blank = jnp.zeros_like(used)
    ones = jnp.ones((len(cells), 1), jnp.int32)
    return Batch(
        tokens=jnp.where(used, tokens, 0),
        positions=jnp.maximum(jnp.cumsum(used, axis=1) - 1, 0),
        segment_ids=used.astype(jnp.int32),
        loss_mask=jnp.concatenate([jnp.zeros_like(before, bool), cells < 0, rows.targets[numbers]], axis=1),
        text_token_mask=blank,
        vision_cell=jnp.concatenate([jnp.full_like(before, NO_CELL), cells, jnp.full_like(after, NO_CELL)], axis=1),
        tile_pixels=jnp.zeros((len(cells), 1, 0, 0, 3), jnp.uint8),
        tile_segment=ones,
        tile_image=ones,
    )


def _levels(model: VisionLanguageModel, rows: Rows, pages: Int[Array, " B"]) -> dict[int, Array]:
    config = model.config
    return {config.vision_feature_layer: rows.levels[pages].astype(config.dtype)[:, None, :, None]}


def _naming_loss(logits: Float[Array, "B K V"], marks: Int[Array, "B K 2"]) -> Float[Array, ""]:
    """The cross-entropy of each vision token with the words of what its patch highlights: the place and the answer."""
    counts = marks > 0
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), marks, axis=-1) * counts) / jnp.sum(counts)


def alignment_loss(model: VisionLanguageModel, rows: Rows, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    """The naming loss of the projector's tokens, each by itself."""
    pages = numbers // VARIANTS
    tokens = model.projector(*_levels(model, rows, pages).values())[:, 0]
    logits = jnp.einsum("bcd,dv->bcv", tokens, model.head_kernel(), preferred_element_type=jnp.float32)
    return _naming_loss(logits, rows.marks[pages])


def _text_loss(
    model: VisionLanguageModel, hidden: Float[Array, "B N D"], batch: Batch, marks: Int[Array, "B K 2"], first: int
) -> Float[Array, ""]:
    """The loss of the targets, plus that of naming at the vision tokens, which begin at `first`."""
    last = first + marks.shape[1]
    logits = model.logits(hidden[:, last - 1 : -1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, last:])
    targets = batch.loss_mask[:, last:]
    naming = _naming_loss(model.logits(hidden[:, first:last]), marks)
    return jnp.sum(losses * targets) / jnp.sum(targets) + naming


def few_patches(key: Array, marks: Int[Array, "B patches 2"], kept: int) -> Int[Array, "B kept"]:
    """The highlighted patches and others at random, in their order."""
    _, cells = jax.lax.top_k((marks[..., 0] > 0) + jax.random.uniform(key, marks.shape[:2]), kept)
    return jnp.sort(cells, axis=1)


def focus_loss(model: VisionLanguageModel, rows: Rows, numbers: Int[Array, " B"], *, kept: int) -> Float[Array, ""]:
    """The loss of rows that hold the highlighted patches and others at random, `kept` in all."""
    pages = numbers // VARIANTS
    marks = rows.marks[pages]
    cells = few_patches(jax.random.key(numbers[0]), marks, kept)
    batch = _batch(rows, numbers, cells)
    hidden, _ = model.run(_levels(model, rows, pages), batch)
    return _text_loss(model, hidden, batch, jnp.take_along_axis(marks, cells[..., None], axis=1), rows.before.shape[1])


def reading_loss(model: VisionLanguageModel, rows: Rows, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    """The loss of rows with all patches, of which a random half gets them only in the decoder's second stage.

    `benchmarks.accuracy.reader` says why.
    """
    pages = numbers // VARIANTS
    batch = _batch(rows, numbers, all_cells(len(numbers), PAGE.grid**2))
    projected = model.embed(batch, _levels(model, rows, pages))
    hidden = _run_half_late(model, batch, projected, jax.random.key(numbers[0]))
    return _text_loss(model, hidden, batch, rows.marks[pages], rows.before.shape[1])


def noise_loss(model: VisionLanguageModel, rows: Rows, numbers: Int[Array, " B"], *, kept: int) -> Float[Array, ""]:
    """The loss of rows with few patches, whose vision tokens are mixed with each other and with noise.

    With a decoder that has only seen the clean tokens of a trained projector, a projector that starts at random learned
    late or not at all from captions. The rows have few patches, because a compressed image has few vision tokens.
    """
    pages = numbers // VARIANTS
    marks, first = rows.marks[pages], rows.before.shape[1]
    cells_key, late_key, *keys = jax.random.split(jax.random.key(numbers[0]), 6)
    cells = few_patches(cells_key, marks, kept)
    batch = _batch(rows, numbers, cells)
    projected = model.embed(batch, _levels(model, rows, pages))
    vision = slice(first, first + kept)
    projected = projected.at[:, vision].set(disturb(projected[:, vision], keys))
    hidden = _run_half_late(model, batch, projected, late_key)
    return _text_loss(model, hidden, batch, jnp.take_along_axis(marks, cells[..., None], axis=1), first)


def disturb(tokens: Float[Array, "B K D"], keys: Sequence[Array]) -> Float[Array, "B K D"]:
    """Adds up to 60 % of another token, and noise of up to 1.2 times the token's size; both shares differ by row."""
    rows, count, _ = tokens.shape
    others = tokens[:, jax.random.permutation(keys[0], count)]
    tokens += jax.random.uniform(keys[1], (rows, 1, 1), maxval=MIXED) * (others - tokens)
    size = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(tokens**2, axis=-1, keepdims=True)))
    share = jax.random.uniform(keys[2], (rows, 1, 1), maxval=NOISE)
    return tokens + share * size * jax.random.normal(keys[3], tokens.shape)


def _run_half_late(
    model: VisionLanguageModel, batch: Batch, embedded: Float[Array, "B N D"], key: Array
) -> Float[Array, "B N D"]:
    """The final hidden states, where a random half of the rows gets its vision tokens only in the second stage."""
    late = jax.random.bernoulli(key, 0.5, (embedded.shape[0], 1, 1))
    held_back = jnp.where((batch.vision_cell >= 0)[..., None] & late, embedded, 0)

    def add_late(stage: int, inputs: DecoderInputs, state: None) -> tuple[DecoderInputs, None]:
        return (inputs.replace(hidden=inputs.hidden + held_back) if stage == 1 else inputs), state

    inputs = DecoderInputs(hidden=embedded - held_back, positions=batch.positions, segment_ids=batch.segment_ids)
    hidden, _ = model.decoder(inputs, None, StageHook(add_late, None))
    return hidden


def target_accuracy(model: VisionLanguageModel, rows: Rows) -> dict[str, float]:
    """The share of targets that are the most likely next token, of questions and of captions."""

    @jax.jit
    def count(model: VisionLanguageModel, numbers: Int[Array, " B"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        batch = _batch(rows, numbers, all_cells(len(numbers), PAGE.grid**2))
        hidden, _ = model.run(_levels(model, rows, numbers // VARIANTS), batch)
        right = model.logits(hidden[:, :-1]).argmax(-1) == batch.tokens[:, 1:]
        # The answers are the targets that are letters or digits; ends of messages are easily right.
        targets = batch.loss_mask[:, 1:] & jnp.isin(batch.tokens[:, 1:], answers)
        return jnp.sum(right & targets, axis=1), jnp.sum(targets, axis=1)

    answers = jnp.unique(rows.marks[..., 1])[1:]
    parts = [count(model, jnp.arange(k, k + 2 * VARIANTS)) for k in range(0, rows.before.shape[0] - 5, 2 * VARIANTS)]
    right, targets = (np.concatenate(column).reshape(-1, VARIANTS) for column in zip(*parts, strict=True))
    question, caption = np.s_[:, : VARIANTS - 1], np.s_[:, VARIANTS - 1 :]
    return {
        "questions": float(right[question].sum() / targets[question].sum()),
        "captions": float(right[caption].sum() / targets[caption].sum()),
    }
