"""Stage 2: the uncompressed model learns to answer questions; its decoder is every system's starting point.

Looking a patch up by a word of the question is a circuit that forms late in training from scratch. Three things
bring it forward: keys start equal to queries (`_match_contents`), the projector first says each patch in the decoder's
own words (`alignment_loss`), and the decoder finds answers among few patches (`focus_loss`) before among all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.optimization import Loss, Trainer
from benchmarks.accuracy.settings import Schedule, Setting
from benchmarks.accuracy.tasks import PAD, PROMPT, TOKEN
from benchmarks.accuracy.training import CachedPictures, new_model, question_loss, size_of
from vr_jax.model.llava import Llava


def alignment_loss(model: Llava, data: CachedPictures, numbers: Int[Array, " B"]) -> Float[Array, ""]:
    """Each marked patch's projection against the embeddings of its address and its answer, both at once."""
    pictures = numbers // data.tokens.shape[1]
    marks = data.marks[pictures].astype(jnp.int32)
    features = data.levels[model.config.vision_feature_layer][pictures].astype(model.config.dtype)
    likelihood = jax.nn.log_softmax(model.logits(model.projector(features[:, :, None])))
    marked = marks[..., 0] != TOKEN[PAD]
    return -jnp.sum(jnp.take_along_axis(likelihood, marks, axis=-1).mean(-1) * marked) / jnp.sum(marked)


def focus_loss(model: Llava, data: CachedPictures, numbers: Int[Array, " B"], *, kept: int) -> Float[Array, ""]:
    """The questions, with only `kept` of the patches to look through: those asked about, and others at random."""
    pictures, variants = jnp.divmod(numbers, data.tokens.shape[1])
    asked = data.tokens[pictures, variants, PROMPT - 1 :: PROMPT + 1]
    wanted = jnp.any(data.marks[pictures][:, :, None, 0] == asked[:, None, :], axis=-1)
    noise = jax.random.uniform(jax.random.key(numbers[0]), wanted.shape)
    _, cells = jax.lax.top_k(wanted + noise, kept)
    return question_loss(model, data, numbers, jnp.sort(cells, axis=1))


def _match_contents(model: Llava) -> None:
    """Keys start as queries do, so that attention prefers equal contents from the first step: a question's word finds
    the patches that say the same ("mimetic initialization", Trockman and Kolter, arXiv 2305.09828)."""
    text = model.config.text
    for stage in model.decoder.stages:
        layers, width, _ = stage.attn.q.kernel.shape
        by_group = stage.attn.q.kernel[...].reshape(layers, width, text.num_kv_heads, -1, text.head_dim)
        stage.attn.k.kernel[...] = by_group[:, :, :, 0].reshape(layers, width, -1)


def train_reader(setting: Setting, data: CachedPictures, *, seed: int, log: Callable[[str], None]) -> Llava:
    model = new_model(size_of(setting), seed=seed)
    _match_contents(model)
    stages: list[tuple[str, Loss, Schedule]] = [("alignment", alignment_loss, setting.alignment)]
    for stage in setting.curriculum:
        loss: Loss = question_loss
        if stage.patches is not None:
            loss = partial(focus_loss, kept=stage.patches)
        stages.append((f"{stage.patches or 'all'} patches", loss, stage.schedule))
    for name, loss, schedule in stages:
        trainer: Trainer[Llava] = Trainer(loss, schedule)
        model = trainer.train(model, data, data.rows, seed=seed, log=lambda line, name=name: log(f"{name}, {line}"))
    return model
