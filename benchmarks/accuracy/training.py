"""Trains and scores whole models on the encoder's cached hidden states: batches, losses and scores."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.dataset import Dataset
from benchmarks.accuracy.encoder import Cached
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.tasks import PAD, PROMPT, TOKEN
from vr_jax.data.demo.pages import KINDS
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.transformer import DecoderLayer
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.vlm import Levels, VisionLanguageModel
from vr_jax.model.windows import to_windows
from vr_jax.pytree import array_dataclass

SCORE_BATCH = 100  # Images at a time where nothing is trained.


@array_dataclass
class CachedImages:
    """The arrays of a data set that training needs, on the device."""

    levels: dict[int, Float[Array, "count patches Dv"]]
    marks: Int[Array, "count patches 2"]
    tokens: Int[Array, "count variants row"]

    @classmethod
    def of(cls, data: Dataset, levels: Cached) -> CachedImages:
        """Copies a data set and its cached hidden states to the device."""
        on_device = {level: jnp.asarray(states) for level, states in levels.items()}
        others = (jnp.asarray(array) for array in (data.marks, data.tokens))
        return cls(on_device, *others)

    @property
    def rows(self) -> int:
        """The number of rows of questions. Row r is variant r % variants of image r // variants."""
        return self.tokens.shape[0] * self.tokens.shape[1]


def size_of(setting: Setting) -> VlmConfig:
    """The config of the uncompressed model, whose encoder, decoder and images every system shares."""
    return VlmConfig(
        encoder=setting.vision,
        decoder=setting.text,
        projector=MlpConfig(),
        image=single_tile(setting.page.side),
        vision_feature_layer=setting.kept_levels[-1],
        dtype=setting.dtype,
    )


def new_model(config: VlmConfig, *, seed: int, decoder: VisionLanguageModel | None = None) -> VisionLanguageModel:
    """A new model without an encoder.

    The encoder is left out because its hidden states are cached, so nothing of it is trained, stored or counted.

    Args:
        config: The model.
        seed: Seed of the initial values.
        decoder: A model whose decoder parameters take the place of the initial ones.
    """
    model = VisionLanguageModel(config, rngs=nnx.Rngs(seed))
    model.encoder = None  # type: ignore[assignment]  # No code below reads the encoder of a trained model.
    if decoder is not None:
        _copy_decoder(decoder, model)
    return model


def _copy_decoder(source: VisionLanguageModel, target: VisionLanguageModel) -> None:
    """Copies embedding, layers and final norm, whatever stages the two decoders have."""
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *source.decoder.stages)

    def part(start: int, stop: int) -> DecoderLayer:
        # The leaves are copied, here and below, because training donates its arguments.
        return jax.tree.map(lambda leaf: jnp.copy(leaf[start:stop]), whole)

    target.decoder.stages = nnx.List([part(*bounds) for bounds in itertools.pairwise(target.decoder.bounds)])
    target.decoder.embed = jax.tree.map(jnp.copy, source.decoder.embed)
    target.decoder.norm = jax.tree.map(jnp.copy, source.decoder.norm)
    if not source.config.decoder.tie_word_embeddings:
        target.decoder.lm_head = jax.tree.map(jnp.copy, source.decoder.lm_head)


def window_levels(config: VlmConfig, cached: dict[int, Array], images: Int[Array, " B"]) -> Levels:
    """The cached hidden states of some images, window-major, with one tile per image."""
    stride, dtype = config.projector.stride, jnp.dtype(config.dtype)
    return {level: to_windows(cached[level][images].astype(dtype), stride)[:, None] for level in config.feature_levels}


def _batch(config: VlmConfig, text: Int[Array, "B M"], cells: Int[Array, "B K"]) -> Batch:
    """Rows of vision tokens followed by text, in one segment.

    Only the first question is pooled into the text-guided token, because the later questions have read answers. A
    vision token has the rotary position of the first patch of its window, and the text follows all patches. So the
    distances, which the decoder learned without compression, stay the same.
    """
    (rows, kept), length = cells.shape, text.shape[1]
    ones = jnp.ones((rows, kept + length), jnp.int32)
    index = jnp.arange(kept + length)
    row, column = jnp.divmod(cells, config.cells_per_side)
    place = (row * config.encoder.grid + column) * config.projector.stride
    after_image = jnp.broadcast_to(config.encoder.grid**2 + jnp.arange(length), text.shape)
    return Batch(
        tokens=jnp.concatenate([jnp.zeros_like(cells), text], axis=1),
        positions=jnp.concatenate([place, after_image], axis=1),
        segment_ids=ones,
        loss_mask=jnp.zeros_like(ones, bool),
        text_token_mask=jnp.broadcast_to((index >= kept) & (index < kept + PROMPT), ones.shape),
        vision_cell=jnp.concatenate([cells, jnp.full_like(text, NO_CELL)], axis=1),
        tile_pixels=jnp.zeros((rows, 1, 0, 0, 3), jnp.uint8),
        tile_segment=ones[:, :1],
        tile_image=ones[:, :1],
    )


def all_cells(rows: int, count: int) -> Int[Array, "B K"]:
    """The numbers of all vision tokens, for each row."""
    return jnp.broadcast_to(jnp.arange(count), (rows, count))


def _naming_loss(logits: Float[Array, "B cells V"], marks: Int[Array, "B patches 2"], stride: int) -> Float[Array, ""]:
    """The cross-entropy of each vision token with the words of what its window highlights: the block and the answer."""
    shown = to_windows(marks.astype(jnp.int32), stride)
    shown = shown.reshape(*shown.shape[:2], -1)
    counts = shown != TOKEN[PAD]
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), shown, axis=-1) * counts) / jnp.sum(counts)


def alignment_loss(
    projector: Any,
    data: CachedImages,
    numbers: Int[Array, " B"],
    *,
    config: VlmConfig,
    words: Float[Array, "D V"],
) -> Float[Array, ""]:
    """The loss of a projector whose tokens, each by itself, name what is highlighted in their windows.

    A projector that starts at random destroys what the decoder has learned before it learns to use it. This loss, which
    trains the projector alone, comes before.

    Args:
        projector: The projector.
        data: The training data.
        numbers: The rows of the batch.
        config: The model.
        words: The decoder's output matrix.
    """
    images = numbers // data.tokens.shape[1]
    levels = window_levels(config, data.levels, images)
    tokens = projector(*(levels[level] for level in config.projector.feature_levels(config.spec)))
    logits = jnp.einsum("bcd,dv->bcv", tokens[:, 0], words, preferred_element_type=jnp.float32)
    return _naming_loss(logits, data.marks[images], config.projector.stride)


def question_batch(
    config: VlmConfig, data: CachedImages, numbers: Int[Array, " B"], cells: Int[Array, "B K"] | None = None
) -> tuple[Int[Array, " B"], Int[Array, "B M"], Batch]:
    """The images, the questions with their answers, and the batch of some rows.

    Args:
        config: The model.
        data: The data.
        numbers: The rows.
        cells: The vision tokens that each row holds; None stands for all.
    """
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    text = data.tokens[images, variants].astype(jnp.int32)
    return images, text, _batch(config, text, all_cells(len(text), config.cells_per_tile) if cells is None else cells)


def answer_loss(
    model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"], *, cells: Int[Array, "B K"] | None = None
) -> Float[Array, ""]:
    """The loss of the answers in some rows.

    Args:
        model: The model.
        data: The data.
        numbers: The rows.
        cells: The vision tokens that each row holds. With None, which stands for all, the naming loss is added (see
            `answer_and_naming_loss`).
    """
    images, text, batch = question_batch(model.config, data, numbers, cells)
    hidden, _ = model.run(window_levels(model.config, data.levels, images), batch)
    if cells is not None:
        return _answer_loss(model, hidden[:, cells.shape[1] :], text)
    return answer_and_naming_loss(model, hidden, text, data.marks[images])


def answer_and_naming_loss(
    model: VisionLanguageModel, hidden: Float[Array, "B N D"], text: Int[Array, "B M"], marks: Int[Array, "B patches 2"]
) -> Float[Array, ""]:
    """The cross-entropy of the answers, plus that of naming what is highlighted in the window of every vision token.

    Both come from the same forward pass. Naming does for all systems what captions do in the paper's first phase: every
    vision token gets a gradient, and not only those that a question is about.
    """
    count = model.config.cells_per_tile
    naming = _naming_loss(model.logits(hidden[:, :count]), marks, model.config.projector.stride)
    return _answer_loss(model, hidden[:, count:], text) + naming


def _answer_loss(
    model: VisionLanguageModel, hidden: Float[Array, "B M D"], text: Int[Array, "B M"]
) -> Float[Array, ""]:
    logits = model.logits(hidden[:, PROMPT - 1 :: PROMPT + 1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, PROMPT :: PROMPT + 1]))


def answers_of(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Int[Array, " B"]:
    """The greedy answers to the first question of some rows, from prompts that end with that question."""
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    prompt = data.tokens[images, variants, :PROMPT].astype(jnp.int32)
    cells = all_cells(len(prompt), model.config.cells_per_tile)
    batch = _batch(model.config, prompt, cells)
    hidden, _ = model.run(window_levels(model.config, data.levels, images), batch)
    return jnp.argmax(model.logits(hidden[:, -1]), axis=-1)


@dataclass(frozen=True)
class Score:
    """The share of right answers on held-out images; `overall` is the mean over the kinds of images."""

    overall: float
    kinds: dict[str, float]


class Scorer:
    """Scores models. It is compiled once for all seeds of a system."""

    def __init__(self) -> None:
        """Wraps the jitted function."""
        self._answers = jax.jit(answers_of)

    def score(self, model: VisionLanguageModel, held_out: Dataset, cached: CachedImages) -> Score:
        """Answers the first question of every row of the held-out images and counts the right answers."""
        rows = np.arange(cached.rows)
        parts = np.split(rows, rows[SCORE_BATCH::SCORE_BATCH])
        answers = np.concatenate([self._answers(model, cached, jnp.asarray(part)) for part in parts])
        right = answers.reshape(len(held_out), -1) == held_out.tokens[:, :, PROMPT]
        kinds = {kind: float(right[held_out.kinds == number].mean()) for number, kind in enumerate(KINDS)}
        return Score(float(np.mean(list(kinds.values()))), kinds)
