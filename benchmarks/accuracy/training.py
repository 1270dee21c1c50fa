"""A whole model on cached encoder states: its batches, its loss, its score."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.dataset import Dataset
from benchmarks.accuracy.encoder import Cached
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.tasks import KINDS, PAD, PROMPT, TOKEN
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.qwen2 import DecoderLayer
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.vlm import Levels, VisionLanguageModel
from vr_jax.model.windows import to_windows
from vr_jax.pytree import array_dataclass

SCORE_BATCH = 100  # images at a time where nothing is trained


@array_dataclass
class CachedImages:
    """What training needs of a data set, on the device."""

    levels: dict[int, Float[Array, "count patches Dv"]]
    marks: Int[Array, "count patches 2"]
    tokens: Int[Array, "count variants row"]

    @classmethod
    def of(cls, data: Dataset, levels: Cached) -> CachedImages:
        on_device = {level: jnp.asarray(states) for level, states in levels.items()}
        others = (jnp.asarray(array) for array in (data.marks, data.tokens))
        return cls(on_device, *others)

    @property
    def rows(self) -> int:
        """Rows of questions: row r is variant r % variants of image r // variants."""
        return self.tokens.shape[0] * self.tokens.shape[1]


def size_of(setting: Setting) -> VlmConfig:
    """The uncompressed model, of which every system takes encoder, decoder and images."""
    return VlmConfig(
        encoder=setting.vision,
        decoder=setting.text,
        projector=MlpConfig(),
        image=single_tile(setting.page.side),
        vision_feature_layer=setting.kept_levels[-1],
        dtype=setting.dtype,
    )


def new_model(config: VlmConfig, *, seed: int, decoder: VisionLanguageModel | None = None) -> VisionLanguageModel:
    """Fresh parts are drawn from `seed`; the decoder's own weights are those of `decoder`. The vision tower is dropped,
    because its hidden states are cached: nothing of it is trained, stored or counted."""
    model = VisionLanguageModel(config, rngs=nnx.Rngs(seed))
    model.encoder = None  # type: ignore[assignment]
    if decoder is not None:
        _copy_decoder(decoder, model)
    return model


def _copy_decoder(source: VisionLanguageModel, target: VisionLanguageModel) -> None:
    """Embedding, layers and final norm, whatever stages the two are cut into."""
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *source.decoder.stages)

    def part(start: int, stop: int) -> DecoderLayer:
        # Copies, here and below, because training consumes what it is given.
        return jax.tree.map(lambda leaf: jnp.copy(leaf[start:stop]), whole)

    target.decoder.stages = nnx.List([part(*bounds) for bounds in itertools.pairwise(target.decoder.bounds)])
    target.decoder.embed = jax.tree.map(jnp.copy, source.decoder.embed)
    target.decoder.norm = jax.tree.map(jnp.copy, source.decoder.norm)
    if not source.config.decoder.tie_word_embeddings:
        target.decoder.lm_head = jax.tree.map(jnp.copy, source.decoder.lm_head)


def window_levels(config: VlmConfig, cached: dict[int, Array], images: Int[Array, " B"]) -> Levels:
    """One tile per image, window-major."""
    stride, dtype = config.projector.stride, jnp.dtype(config.dtype)
    return {level: to_windows(cached[level][images].astype(dtype), stride)[:, None] for level in config.feature_levels}


def _batch(config: VlmConfig, text: Int[Array, "B M"], cells: Int[Array, "B K"]) -> Batch:
    """Rows of vision tokens, then text, in one segment. Only the first question may be pooled by a re-fusion block: the
    later ones     have read answers.

    A vision token has the rotary position of its window's first patch, and text follows all patches: distances, which
    the decoder learned without compression, stay what they were."""
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
    return jnp.broadcast_to(jnp.arange(count), (rows, count))


def _naming_loss(logits: Float[Array, "B cells V"], marks: Int[Array, "B patches 2"], stride: int) -> Float[Array, ""]:
    """Each vision token against the words of what is highlighted in its window: the block and the answer."""
    shown = to_windows(marks.astype(jnp.int32), stride)
    shown = shown.reshape(*shown.shape[:2], -1)  # (B, cells, patches * 2)
    counts = shown != TOKEN[PAD]
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), shown, axis=-1) * counts) / jnp.sum(counts)


def alignment_loss(
    projector: nnx.Module,
    data: CachedImages,
    numbers: Int[Array, " B"],
    *,
    config: VlmConfig,
    words: Float[Array, "D V"],
) -> Float[Array, ""]:
    """The projected tokens, each alone, name what is highlighted in their windows. words: the decoder's output matrix.

    Without it, a projector that starts at random takes the decoder's circuits apart before it learns to use them."""
    images = numbers // data.tokens.shape[1]
    levels = window_levels(config, data.levels, images)
    tokens = projector(*(levels[level] for level in config.projector.feature_levels(config.spec)))  # type: ignore[operator]
    logits = jnp.einsum("bcd,dv->bcv", tokens[:, 0], words, preferred_element_type=jnp.float32)
    return _naming_loss(logits, data.marks[images], config.projector.stride)


def question_batch(
    config: VlmConfig, data: CachedImages, numbers: Int[Array, " B"], cells: Int[Array, "B K"] | None = None
) -> tuple[Int[Array, " B"], Int[Array, "B M"], Batch]:
    """Images, questions with answers, and batch of rows `numbers`. cells: the vision tokens it holds; None: all."""
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    text = data.tokens[images, variants].astype(jnp.int32)
    return images, text, _batch(config, text, all_cells(len(text), config.cells_per_tile) if cells is None else cells)


def answer_loss(
    model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"], *, cells: Int[Array, "B K"] | None = None
) -> Float[Array, ""]:
    """Of the answers in rows `numbers`; with all vision tokens (`cells` None) also of naming, see below."""
    images, text, batch = question_batch(model.config, data, numbers, cells)
    hidden, _ = model.run(window_levels(model.config, data.levels, images), batch)
    if cells is not None:
        return _answer_loss(model, hidden[:, cells.shape[1] :], text)
    return answer_and_naming_loss(model, hidden, text, data.marks[images])


def answer_and_naming_loss(
    model: VisionLanguageModel, hidden: Float[Array, "B N D"], text: Int[Array, "B M"], marks: Int[Array, "B patches 2"]
) -> Float[Array, ""]:
    """Cross-entropy of the answers, and of naming what is highlighted at every vision token of the same forward pass.

    Naming is to all systems what captions are in the paper's first phase: a signal for every token, not only for those
    that a question is about."""
    count = model.config.cells_per_tile
    naming = _naming_loss(model.logits(hidden[:, :count]), marks, model.config.projector.stride)
    return _answer_loss(model, hidden[:, count:], text) + naming


def _answer_loss(
    model: VisionLanguageModel, hidden: Float[Array, "B M D"], text: Int[Array, "B M"]
) -> Float[Array, ""]:
    logits = model.logits(hidden[:, PROMPT - 1 :: PROMPT + 1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, PROMPT :: PROMPT + 1]))


def answers_of(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Int[Array, " B"]:
    """The greedy answer to the first question of rows `numbers`, from prompts that end with it."""
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    prompt = data.tokens[images, variants, :PROMPT].astype(jnp.int32)
    cells = all_cells(len(prompt), model.config.cells_per_tile)
    batch = _batch(model.config, prompt, cells)
    hidden, _ = model.run(window_levels(model.config, data.levels, images), batch)
    return jnp.argmax(model.logits(hidden[:, -1]), axis=-1)


@dataclass(frozen=True)
class Score:
    """Share of right answers on held-out images; `overall` is the mean of the kinds."""

    overall: float
    kinds: dict[str, float]


class Scorer:
    """Compiled once for all seeds of a system."""

    def __init__(self) -> None:
        self._answers = jax.jit(answers_of)

    def score(self, model: VisionLanguageModel, held_out: Dataset, cached: CachedImages) -> Score:
        rows = np.arange(cached.rows)
        parts = np.split(rows, rows[SCORE_BATCH::SCORE_BATCH])
        answers = np.concatenate([self._answers(model, cached, jnp.asarray(part)) for part in parts])
        right = answers.reshape(len(held_out), -1) == held_out.tokens[:, :, PROMPT]
        kinds = {kind: float(right[held_out.kinds == number].mean()) for number, kind in enumerate(KINDS)}
        return Score(float(np.mean(list(kinds.values()))), kinds)
