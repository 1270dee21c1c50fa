"""Trains the tiny SigLIP and the tiny Qwen2 of the comparison on pages, and writes them in Hugging Face format.

    python -m benchmarks.accuracy.reading_parts [--output=vr_jax/data/demo/pretrained] [--setting=cpu]

The encoder learns to read the generated pages of `vr_jax.data.demo` patch by patch (`encoder`). The decoder learns to
caption the pages and to answer questions about them in the chat format, with every patch as a vision token and without
Vision Remember, in the stages of `reader`. Its projector is thrown away. What is written is
what `vr-jax convert export` writes of the two parts, and README.md, a card with the data, the steps and the scores.
The work directory keeps what is finished, so the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from benchmarks import arguments
from benchmarks.accuracy.dataset import generate
from benchmarks.accuracy.encoder import PatchReader, answer_accuracy, train_encoder
from benchmarks.accuracy.optimization import Loss, Trainer
from benchmarks.accuracy.preparation import stored
from benchmarks.accuracy.reader import match_contents
from benchmarks.accuracy.settings import SETTINGS, Schedule, Setting
from benchmarks.accuracy.training import all_cells, new_model
from vr_jax.convert import export_checkpoint
from vr_jax.convert.source_sections import PIXEL_FIELDS
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder
from vr_jax.data.demo.pages import Split
from vr_jax.data.demo.reading import PAGE, PLACES, ReadingSample, ReadingSource, conversations, place_of
from vr_jax.data.demo.tokenizer import reading_tokenizer
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import PIXELS, save_params
from vr_jax.pytree import array_dataclass
from vr_jax.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
TURNS = 3
VOCABULARY = 288
PAD_ID = -1  # A token slot that is not used.


@dataclass(frozen=True)
class Stages:
    """The schedules of the decoder's stages, and the sizes of one run.

    Attributes:
        pages: Pages to train on.
        held_out: Pages to score on.
        alignment: The projector alone learns to name what each patch shows.
        focus: Rows with few patches.
        reading: Rows with all patches, in half of which the image arrives late.
        kept: Patches in a row of the second stage.
        late: Layers without the image in those rows.
    """

    pages: int
    held_out: int
    alignment: Schedule
    focus: Schedule
    reading: Schedule
    kept: int
    late: int


def stages_of(setting: Setting) -> Stages:
    """The stages of a setting of the comparison, whose encoder the demo has."""
    tiny = setting.name == "toy"
    return Stages(
        pages=20 if tiny else 16_000,
        held_out=5 if tiny else 1_000,
        alignment=setting.alignment,
        focus=setting.focus,
        reading=setting.reading,
        kept=setting.focus_patches,
        late=setting.late_arrival,
    )


@array_dataclass
class Rows:
    """Tokenised rows without their vision tokens, on the device.

    Row r is variant r % 3 of page r // 3: questions, other questions, a caption.

    Attributes:
        before: Tokens before the image, aligned at the right.
        after: Tokens after the image.
        targets: Which of the latter are targets.
        levels: The encoder's last hidden state.
        marks: The tokens of place and answer of every highlighted patch; else 0.
    """

    before: Int[Array, "rows P"]
    after: Int[Array, "rows S"]
    targets: Bool[Array, "rows S"]
    levels: Float[Array, "count patches Dv"]
    marks: Int[Array, "count patches 2"]


VARIANTS = 3


def last_states(encoder: PatchReader, samples: Sequence[ReadingSample]) -> np.ndarray:
    """The encoder's last hidden state of every page, in 16 bits."""
    pixels = np.empty((len(samples), PAGE.side, PAGE.side, 3), np.uint8)
    for number, sample in enumerate(samples):
        with open_image(sample.png) as image:
            pixels[number] = decode_rgb(image)
    forward = jax.jit(lambda part: encoder.hidden_states(part)[-1].astype(encoder.cache_dtype))
    return np.concatenate([np.asarray(forward(pixels[k : k + 50])) for k in range(0, len(pixels), 50)])


def make_rows(samples: Sequence[tuple[ReadingSample, ReadingSample]], levels: np.ndarray) -> Rows:
    """Tokenises two draws of questions and the caption of every page."""
    tokenizer = reading_tokenizer()
    chat, plain = (ChatEncoder(tokenizer, name, False, "first_turn") for name in ("qwen_1_5", "plain"))
    texts = []
    for first, second in samples:
        texts += [chat.sample(conversations(one)[1].turns) for one in (first, second)]
        texts.append(plain.sample(conversations(first)[0].turns))
    places = [int(np.flatnonzero(text.tokens == IMAGE_TOKEN)[0]) for text in texts]
    left, right = max(places), max(len(text.tokens) - place - 1 for text, place in zip(texts, places, strict=True))
    before = np.full((len(texts), left), PAD_ID, np.int32)
    after = np.full((len(texts), right), PAD_ID, np.int32)
    targets = np.zeros((len(texts), right), bool)
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        before[number, left - place :] = text.tokens[:place]
        rest = text.tokens[place + 1 :]
        after[number, : len(rest)] = rest
        targets[number, : len(rest)] = text.loss_mask[place + 1 :]
    return Rows(*map(jnp.asarray, (before, after, targets, levels, _marks(samples, tokenizer))))


def _marks(samples: Sequence[tuple[ReadingSample, ReadingSample]], tokenizer: Any) -> np.ndarray:
    def only_token(text: str) -> int:
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        return token

    ids = {text: only_token(text) for text in (*PLACES, *(mark.answer for one, _ in samples for mark in one.marks))}
    marks = np.zeros((len(samples), PAGE.grid**2, 2), np.int32)
    for number, (sample, _) in enumerate(samples):
        for mark in sample.marks:
            marks[number, mark.row * PAGE.grid + mark.column] = ids[place_of(mark)], ids[mark.answer]
    return marks


def model_config(setting: Setting, encoder_level: int) -> VlmConfig:
    """The uncompressed model. Its decoder is that of the comparison with another vocabulary."""
    return VlmConfig(
        encoder=setting.vision,
        decoder=dataclasses.replace(setting.text, vocab_size=VOCABULARY, attention_bias=True),
        projector=MlpConfig(),
        image=single_tile(PAGE.side),
        vision_feature_layer=encoder_level,
    )


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


def focus_loss(model: VisionLanguageModel, rows: Rows, numbers: Int[Array, " B"], *, kept: int) -> Float[Array, ""]:
    """The loss of rows that hold the highlighted patches and others at random, `kept` in all."""
    pages = numbers // VARIANTS
    marks = rows.marks[pages]
    noise = jax.random.uniform(jax.random.key(numbers[0]), marks.shape[:2])
    _, cells = jax.lax.top_k((marks[..., 0] > 0) + noise, kept)
    cells = jnp.sort(cells, axis=1)
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
    late = jax.random.bernoulli(jax.random.key(numbers[0]), 0.5, (len(numbers), 1, 1))
    held_back = jnp.where((batch.vision_cell >= 0)[..., None] & late, projected, 0)

    def add_late(stage: int, inputs: DecoderInputs, state: None) -> tuple[DecoderInputs, None]:
        return (inputs.replace(hidden=inputs.hidden + held_back) if stage == 1 else inputs), state

    inputs = DecoderInputs(hidden=projected - held_back, positions=batch.positions, segment_ids=batch.segment_ids)
    hidden, _ = model.decoder(inputs, None, StageHook(add_late, None))
    return _text_loss(model, hidden, batch, rows.marks[pages], rows.before.shape[1])


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


def new_staged(setting: Setting, stages: Stages) -> VisionLanguageModel:
    """The uncompressed model before training, with a decoder that is cut where images enter late."""
    levels = setting.kept_levels
    # The re-fusion block never acts. It only ends a stage of the decoder where images enter late.
    cut = VisionRememberConfig(insert_after=(stages.late,), levels=levels[-1:], cross_heads=setting.cross_heads)
    config = dataclasses.replace(model_config(setting, levels[-1]), refusion=cut)
    model = new_model(config, seed=SEED)
    match_contents(model)
    return model


def train_decoder(setting: Setting, stages: Stages, rows: Rows, log: Callable[[str], None]) -> VisionLanguageModel:
    """Trains the uncompressed model in three stages."""
    model = new_staged(setting, stages)
    losses: list[tuple[str, Loss, Schedule]] = [
        ("alignment", alignment_loss, stages.alignment),
        ("focus", partial(focus_loss, kept=stages.kept), stages.focus),
        ("reading", reading_loss, stages.reading),
    ]
    for name, loss, schedule in losses:
        trainer: Trainer[VisionLanguageModel] = Trainer(loss, schedule)
        count = rows.before.shape[0]
        model = trainer.train(model, rows, count, seed=SEED, log=lambda line, name=name: log(f"{name}, {line}"))
    return model


def draws(source: ReadingSource) -> list[tuple[ReadingSample, ReadingSample]]:
    """Every page twice, with other questions; pages with few highlighted patches repeat their questions."""
    pairs = []
    for sample in map(source.sample, range(len(source))):
        first, others = sample.questions[:TURNS], sample.questions[TURNS:] or sample.questions[:TURNS]
        pairs.append((dataclasses.replace(sample, questions=first), dataclasses.replace(sample, questions=others)))
    return pairs


def write_parts(output: Path, workdir: Path, encoder: PatchReader, model: VisionLanguageModel, card: str) -> None:
    """Writes the two parts as `vr-jax convert export` does, and the card."""
    config = model.config.to_dict()
    pixels = {name: config["image"][name] for name in PIXEL_FIELDS}
    sections = {"siglip": {"encoder": config["encoder"], PIXELS: pixels}, "qwen2": {"decoder": config["decoder"]}}
    params = {
        "siglip": {f"encoder.{path}": leaf for path, leaf in flatten_params(encoder.vision).items()},
        "qwen2": {f"decoder.{path}": leaf for path, leaf in flatten_params(model.decoder).items()},
    }
    tokenizer = workdir / "tokenizer"
    reading_tokenizer().save_pretrained(tokenizer)
    for name, arrays in params.items():
        directory = workdir / f"{name}_model"
        side_files = tokenizer if name == "qwen2" else None
        save_params(directory, sections[name], merge_stages(arrays), side_files, overwrite=True)
        export_checkpoint(directory, output / name, overwrite=True)
    write_text(output / "README.md", card)


CARD = """# The pretrained parts of the comparison on pages

`siglip/` is a SiglipVisionModel and `qwen2/` a Qwen2ForCausalLM with its tokenizer, both in Hugging Face format. They
are so small that two CPU cores can train models that start from them in minutes. They read the generated pages of
`vr_jax/data/demo/pages.py` and know nothing else.

* **Made by** `python -m benchmarks.accuracy.reading_parts` in {minutes:.0f} minutes ({machine}).
* **Data**: {pages:,} generated pages of 96 x 96 pixels (words, small text, tables of digits, bars, lines) with captions
  and questions; the encoder saw {images:,} such pages. Seed {seed}. No held-out content occurs in training.
* **SigLIP**: {vision_layers} layers of {vision_width} channels, {vision_count:,} parameters; {encoder_steps} steps of
  {encoder_batch} pages with linear heads on every patch. It reads {encoder:.1%} of the held-out patches right.
* **Qwen2**: {text_layers} layers of {text_width} channels, {text_count:,} parameters; {steps} steps with every
  patch as a vision token. With a projector that is thrown away it answers {questions:.1%} of the questions about
  held-out pages, and names {captions:.1%} of what their captions name.
* **Licence**: that of this repository.
"""


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--setting", choices=("cpu", "toy"), default="cpu", help="the sizes; toy is for the tests")
    flags.add_argument("--output", type=arguments.path, default=ROOT / "vr_jax" / "data" / "demo" / "pretrained")
    flags.add_argument("--workdir", type=arguments.path, default=ROOT / "runs" / "reading_parts")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and writes the parts."""
    options = parser().parse_args(argv)
    setting = SETTINGS[options.setting]
    stages, workdir, began = stages_of(setting), options.workdir.resolve(), time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {line}", flush=True)

    held_out = generate(PAGE, "held_out", setting.held_out, seed=SEED, variants=1)
    abstract = nnx.eval_shape(lambda: PatchReader(setting, rngs=nnx.Rngs(SEED)))

    def make_encoder() -> PatchReader:
        return train_encoder(
            setting, generate(PAGE, "train", setting.images, seed=SEED, variants=1), seed=SEED, log=log
        )

    encoder = stored(workdir / "encoder.npz", abstract, make_encoder)
    patches = answer_accuracy(encoder, held_out)
    log(f"encoder: {patches:.4f} of the held-out patches read right")

    def rows_of(split: Split, pages: int) -> Rows:
        pairs = draws(ReadingSource(split, pages, SEED, 2 * TURNS))
        return make_rows(pairs, last_states(encoder, [sample for sample, _ in pairs]))

    def make_decoder() -> VisionLanguageModel:
        return train_decoder(setting, stages, rows_of("train", stages.pages), log)

    model = stored(workdir / "decoder.npz", nnx.eval_shape(lambda: new_staged(setting, stages)), make_decoder)
    scores = target_accuracy(model, rows_of("held_out", stages.held_out))
    log(f"decoder: {scores}")
    schedules = (stages.alignment, stages.focus, stages.reading)
    card = CARD.format(
        minutes=(time.perf_counter() - began) / 60,
        machine=f"{platform.machine()}, jax {jax.__version__}",
        pages=stages.pages,
        images=setting.images,
        seed=SEED,
        vision_layers=setting.vision.num_layers,
        vision_width=setting.vision.hidden_size,
        vision_count=_count(encoder.vision),
        encoder_steps=setting.encoder.steps,
        encoder_batch=setting.encoder.batch,
        encoder=patches,
        text_layers=setting.text.num_layers,
        text_width=setting.text.hidden_size,
        text_count=_count(model.decoder),
        steps=" + ".join(str(schedule.steps) for schedule in schedules),
        **scores,
    )
    write_parts(options.output.resolve(), workdir, encoder, model, card)
    log(f"written to {options.output}")
    return 0


def _count(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(module))


if __name__ == "__main__":
    raise SystemExit(main())
