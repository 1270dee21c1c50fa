"""Stage 2 of the comparison: the uncompressed model learns to answer questions.

Its decoder is the starting point of every system. Attention that finds a patch by a word of the question forms late
when a model is trained from scratch. Three things make it form earlier:

* The keys start equal to the queries (`match_contents`).
* The projector first learns to express each patch in the decoder's own words (`alignment_loss`).
* The decoder first finds answers among few patches (`focus_loss`), and then among all.

In the last stage half of the images enter the decoder only after a few layers (`reading_loss`). Without that, a decoder
as shallow as this one reads the image in its first layers only, so that whatever a re-fusion block adds later is of no
use. A pretrained language model reads the image in many of its layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.optimization import Loss, Trainer
from benchmarks.accuracy.settings import Schedule, Setting
from benchmarks.accuracy.tasks import PROMPT
from benchmarks.accuracy.training import (
    CachedImages,
    alignment_loss,
    answer_and_naming_loss,
    answer_loss,
    new_model,
    question_batch,
    size_of,
    window_levels,
)
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel


def _alignment_loss(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    return alignment_loss(model.projector, data, numbers, config=model.config, words=model.head_kernel())


def focus_loss(
    model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"], *, kept: int
) -> Float[Array, ""]:
    """The loss of the questions where only some vision tokens are in the row.

    Args:
        model: The model.
        data: The training data.
        numbers: The rows of the batch.
        kept: The number of patches in the row: those that are asked about, and others at random.
    """
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    text = data.tokens[images, variants]
    wanted = jnp.any(data.marks[images][:, :, None, 0] == text[:, None, PROMPT - 1 :: PROMPT + 1], axis=-1)
    noise = jax.random.uniform(jax.random.key(numbers[0]), wanted.shape)
    _, cells = jax.lax.top_k(wanted + noise, kept)
    return answer_loss(model, data, numbers, cells=jnp.sort(cells, axis=1))


def reading_loss(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    """The loss of `answer_loss`, where in a random half of the rows the image enters late.

    In these rows the vision tokens are zero in the decoder's first stage. They get their projected patches where the
    second stage begins.
    """
    config = model.config
    images, text, batch = question_batch(config, data, numbers)
    projected = model.embed(batch, window_levels(config, data.levels, images))
    late = jax.random.bernoulli(jax.random.key(numbers[0]), 0.5, (len(text), 1, 1))
    held_back = jnp.where((batch.vision_cell >= 0)[..., None] & late, projected, 0)

    def add_late(stage: int, inputs: DecoderInputs, state: None) -> tuple[DecoderInputs, None]:
        return (inputs.replace(hidden=inputs.hidden + held_back) if stage == 1 else inputs), state

    inputs = DecoderInputs(hidden=projected - held_back, positions=batch.positions, segment_ids=batch.segment_ids)
    hidden, _ = model.decoder(inputs, None, StageHook(add_late, None))
    return answer_and_naming_loss(model, hidden, text, data.marks[images])


def match_contents(model: VisionLanguageModel) -> None:
    """Starts the key projections equal to the query projections.

    Attention then prefers equal contents from the first step, so a word of the question finds the patches that say the
    same. Source: "mimetic initialization", Trockman and Kolter, arXiv 2305.09828.
    """
    text = model.config.decoder
    for stage in model.decoder.stages:
        layers, width, _ = stage.attn.q.kernel.shape
        by_group = stage.attn.q.kernel[...].reshape(layers, width, text.num_kv_heads, -1, text.head_dim)
        stage.attn.k.kernel[...] = by_group[:, :, :, 0].reshape(layers, width, -1)


def train_reader(setting: Setting, data: CachedImages, *, seed: int, log: Callable[[str], None]) -> VisionLanguageModel:
    """Trains the uncompressed model in three stages."""
    # The re-fusion block never acts. It only ends a stage of the decoder where images enter late.
    levels = tuple(setting.levels[level] for level in (7, 15, 23))
    cut = VisionRememberConfig(insert_after=(setting.late_arrival,), levels=levels, cross_heads=setting.cross_heads)
    model = new_model(dataclasses.replace(size_of(setting), refusion=cut), seed=seed)
    match_contents(model)
    stages: list[tuple[str, Loss, Schedule]] = [
        ("alignment", _alignment_loss, setting.alignment),
        ("focus", partial(focus_loss, kept=setting.focus_patches), setting.focus),
        ("reading", reading_loss, setting.reading),
    ]
    for name, loss, schedule in stages:
        trainer: Trainer[VisionLanguageModel] = Trainer(loss, schedule)
        model = trainer.train(model, data, data.rows, seed=seed, log=partial(_prefixed, log, name))
    reader = new_model(size_of(setting), seed=seed, decoder=model)
    reader.projector = model.projector
    return reader


def _prefixed(log: Callable[[str], None], name: str, line: str) -> None:
    log(f"{name}, {line}")
