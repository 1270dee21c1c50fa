"""Stage 2: the uncompressed model learns to answer questions; its decoder is every system's starting point.

Looking a patch up by a word of the question is a circuit that forms late in training from scratch. Three things
bring it forward: keys start equal to queries (`_match_contents`), the projector first says each patch in the decoder's
own words (`alignment_loss`), and the decoder finds answers among few patches (`focus_loss`) before among all.

In the last stage half of the images arrive only after a few layers (`reading_loss`). A decoder this shallow otherwise
does all its looking up in its first layers, where all that a re-fusion block adds is late; a pretrained LLM reads
the image in many of its layers."""

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
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel


def _alignment_loss(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    return alignment_loss(model.projector, data, numbers, config=model.config, words=model.head_kernel())


def focus_loss(
    model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"], *, kept: int
) -> Float[Array, ""]:
    """The questions, with only `kept` of the patches to look through: those asked about, and others at random."""
    images, variants = jnp.divmod(numbers, data.tokens.shape[1])
    text = data.tokens[images, variants]
    wanted = jnp.any(data.marks[images][:, :, None, 0] == text[:, None, PROMPT - 1 :: PROMPT + 1], axis=-1)
    noise = jax.random.uniform(jax.random.key(numbers[0]), wanted.shape)
    _, cells = jax.lax.top_k(wanted + noise, kept)
    return answer_loss(model, data, numbers, cells=jnp.sort(cells, axis=1))


def reading_loss(model: VisionLanguageModel, data: CachedImages, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    """As `answer_loss`; but in every second row, drawn at random, the vision tokens are empty in the decoder's first
    stage and get their projected patches where the second one begins."""
    config = model.config
    images, text, batch = question_batch(config, data, numbers)
    projected = model.embed(batch, window_levels(config, data.levels, images))
    late = jax.random.bernoulli(jax.random.key(numbers[0]), 0.5, (len(text), 1, 1))
    held_back = jnp.where((batch.vision_cell >= 0)[..., None] & late, projected, 0)

    def arrive(stage: int, stream: DecoderInputs) -> DecoderInputs:
        return stream.replace(hidden=stream.hidden + held_back) if stage == 1 else stream

    stream = DecoderInputs(hidden=projected - held_back, positions=batch.positions, segment_ids=batch.segment_ids)
    hidden, _ = model.decoder(stream, None, arrive)
    return answer_and_naming_loss(model, hidden, text, data.marks[images])


def _match_contents(model: VisionLanguageModel) -> None:
    """Keys start as queries do, so that attention prefers equal contents from the first step: a question's word finds
    the patches that say the same ("mimetic initialization", Trockman and Kolter, arXiv 2305.09828)."""
    text = model.config.decoder
    for stage in model.decoder.stages:
        layers, width, _ = stage.attn.q.kernel.shape
        by_group = stage.attn.q.kernel[...].reshape(layers, width, text.num_kv_heads, -1, text.head_dim)
        stage.attn.k.kernel[...] = by_group[:, :, :, 0].reshape(layers, width, -1)


def train_reader(setting: Setting, data: CachedImages, *, seed: int, log: Callable[[str], None]) -> VisionLanguageModel:
    # The re-fusion block never acts; it cuts the decoder where images arrive late.
    levels = tuple(setting.levels[level] for level in (7, 15, 23))
    cut = VisionRememberConfig(insert_after=(setting.late_arrival,), levels=levels, cross_heads=setting.cross_heads)
    model = new_model(dataclasses.replace(size_of(setting), refusion=cut), seed=seed)
    _match_contents(model)
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
