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
from benchmarks.accuracy.tasks import KINDS, PROMPT
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import LlavaConfig, ProjectorConfig, single_tile
from vr_jax.model.llava import Levels, Llava
from vr_jax.model.qwen2 import DecoderLayer
from vr_jax.model.windows import to_windows

SCORE_BATCH = 100  # pictures at a time where nothing is trained


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CachedPictures:
    """What training needs of a data set, on the device."""

    levels: dict[int, Float[Array, "count patches Dv"]]
    marks: Int[Array, "count patches 2"]
    tokens: Int[Array, "count variants row"]

    @classmethod
    def of(cls, data: Dataset, levels: Cached) -> CachedPictures:
        on_device = {level: jnp.asarray(states) for level, states in levels.items()}
        return cls(on_device, jnp.asarray(data.marks), jnp.asarray(data.tokens))

    @property
    def rows(self) -> int:
        """Rows of questions: row r is variant r % variants of picture r // variants."""
        return self.tokens.shape[0] * self.tokens.shape[1]


def size_of(setting: Setting) -> LlavaConfig:
    """The uncompressed model, of which every system takes encoder, decoder and pictures."""
    return LlavaConfig(
        vision=setting.vision,
        text=setting.text,
        projector=ProjectorConfig(name="mlp", stride=1),
        image=single_tile(setting.page.side),
        vision_feature_layer=setting.kept_levels[-1],
        dtype=setting.dtype,
    )


def new_model(config: LlavaConfig, *, seed: int, decoder: Llava | None = None) -> Llava:
    """Fresh parts are drawn from `seed`; the decoder's own weights are those of `decoder`. The vision tower is dropped,
    because its hidden states are cached: nothing of it is trained, stored or counted."""
    model = Llava(config, rngs=nnx.Rngs(seed))
    model.vision = None
    if decoder is not None:
        _copy_decoder(decoder, model)
    return model


def _copy_decoder(source: Llava, target: Llava) -> None:
    """Embedding, layers and final norm, whatever stages the two are cut into."""
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *source.decoder.stages)

    def part(start: int, stop: int) -> DecoderLayer:
        # Copies, here and below, because training consumes what it is given.
        return jax.tree.map(lambda leaf: jnp.copy(leaf[start:stop]), whole)

    target.decoder.stages = nnx.List([part(*bounds) for bounds in itertools.pairwise(target.decoder.bounds)])
    target.decoder.embed = jax.tree.map(jnp.copy, source.decoder.embed)
    target.decoder.norm = jax.tree.map(jnp.copy, source.decoder.norm)
    if not source.config.text.tie_word_embeddings:
        target.decoder.lm_head = jax.tree.map(jnp.copy, source.decoder.lm_head)


def _levels(config: LlavaConfig, cached: dict[int, Array], pictures: Int[Array, " B"]) -> Levels:
    """One tile per picture, window-major."""
    stride, dtype = config.projector.stride, jnp.dtype(config.dtype)
    return {
        level: to_windows(cached[level][pictures].astype(dtype), stride)[:, None] for level in config.feature_levels
    }


def _batch(config: LlavaConfig, text: Int[Array, "B M"], cells: Int[Array, "B K"]) -> Batch:
    """Rows of vision tokens, then text, in one segment. Only the first question may guide an interlude: the later ones
    have read answers."""
    (rows, kept), length = cells.shape, text.shape[1]
    ones = jnp.ones((rows, kept + length), jnp.int32)
    index = jnp.arange(kept + length)
    after_picture = jnp.broadcast_to(config.cells_per_tile + jnp.arange(length), text.shape)
    return Batch(
        tokens=jnp.concatenate([jnp.zeros_like(cells), text], axis=1),
        positions=jnp.concatenate([cells, after_picture], axis=1),
        segment_ids=ones,
        loss_mask=jnp.zeros_like(ones, bool),
        guide_mask=jnp.broadcast_to((index >= kept) & (index < kept + PROMPT), ones.shape),
        vision_cell=jnp.concatenate([cells, jnp.full_like(text, NO_CELL)], axis=1),
        tile_pixels=jnp.zeros((rows, 1, 0, 0, 3), jnp.uint8),
        tile_segment=ones[:, :1],
        tile_image=ones[:, :1],
    )


def _all_cells(config: LlavaConfig, rows: int) -> Int[Array, "B K"]:
    return jnp.broadcast_to(jnp.arange(config.cells_per_tile), (rows, config.cells_per_tile))


def question_loss(
    model: Llava, data: CachedPictures, numbers: Int[Array, " B"], cells: Int[Array, "B K"] | None = None
) -> Float[Array, ""]:
    """Cross-entropy of the answers in rows `numbers`. cells: the vision tokens that the decoder sees; None: all."""
    pictures, variants = jnp.divmod(numbers, data.tokens.shape[1])
    text = data.tokens[pictures, variants].astype(jnp.int32)
    if cells is None:
        cells = _all_cells(model.config, len(text))
    hidden, _ = model.run(_levels(model.config, data.levels, pictures), _batch(model.config, text, cells))
    logits = model.logits(hidden[:, cells.shape[1] + PROMPT - 1 :: PROMPT + 1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, PROMPT :: PROMPT + 1]))


def first_answers(model: Llava, data: CachedPictures, numbers: Int[Array, " B"]) -> Int[Array, " B"]:
    """The greedy answer to the first question of rows `numbers`, from prompts that end with it."""
    pictures, variants = jnp.divmod(numbers, data.tokens.shape[1])
    prompt = data.tokens[pictures, variants, :PROMPT].astype(jnp.int32)
    batch = _batch(model.config, prompt, _all_cells(model.config, len(prompt)))
    hidden, _ = model.run(_levels(model.config, data.levels, pictures), batch)
    return jnp.argmax(model.logits(hidden[:, -1]), axis=-1)


@dataclass(frozen=True)
class Score:
    """Share of right answers on held-out pictures; `overall` is the mean of the kinds."""

    overall: float
    kinds: dict[str, float]


class Scorer:
    """Compiled once for all seeds of a system."""

    def __init__(self) -> None:
        self._answers = jax.jit(first_answers)

    def score(self, model: Llava, held_out: Dataset, cached: CachedPictures) -> Score:
        rows = np.arange(cached.rows)
        parts = np.split(rows, rows[SCORE_BATCH::SCORE_BATCH])
        answers = np.concatenate([self._answers(model, cached, jnp.asarray(part)) for part in parts])
        right = answers.reshape(len(held_out), -1) == held_out.tokens[:, :, PROMPT]
        kinds = {kind: float(right[held_out.kinds == number].mean()) for number, kind in enumerate(KINDS)}
        return Score(float(np.mean(list(kinds.values()))), kinds)
