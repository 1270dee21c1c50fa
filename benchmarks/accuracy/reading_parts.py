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

import jax
from flax import nnx

from benchmarks import arguments
from benchmarks.accuracy.dataset import generate
from benchmarks.accuracy.encoder import PatchReader, answer_accuracy, train_encoder
from benchmarks.accuracy.optimization import Loss, Trainer
from benchmarks.accuracy.preparation import stored
from benchmarks.accuracy.reader import match_contents
from benchmarks.accuracy.reading_losses import alignment_loss, focus_loss, noise_loss, reading_loss, target_accuracy
from benchmarks.accuracy.reading_rows import TURNS, Rows, draws, last_states, make_rows
from benchmarks.accuracy.settings import SETTINGS, Schedule, Setting
from benchmarks.accuracy.training import new_model
from vr_jax.convert import export_checkpoint
from vr_jax.convert.source_sections import PIXEL_FIELDS
from vr_jax.data.demo.pages import Split
from vr_jax.data.demo.reading import PAGE, ReadingSource
from vr_jax.data.demo.tokenizer import reading_tokenizer
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import PIXELS, save_params
from vr_jax.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
VOCABULARY = 288


@dataclass(frozen=True)
class Stages:
    """The schedules of the decoder's stages, and the sizes of one run.

    Attributes:
        pages: Pages to train on.
        held_out: Pages to score on.
        alignment: The projector alone learns to name what each patch shows.
        focus: Rows with few patches.
        reading: Rows with all patches, in half of which the image arrives late.
        noise: Rows with few patches, whose vision tokens are disturbed.
        kept: Patches in a row of the second and of the last stage.
        late: Layers without the image in those rows.
    """

    pages: int
    held_out: int
    alignment: Schedule
    focus: Schedule
    reading: Schedule
    noise: Schedule
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
        noise=Schedule(steps=2 if tiny else 800, batch=5 if tiny else 48, learning_rate=1e-3, muon=True),
        kept=setting.focus_patches,
        late=setting.late_arrival,
    )


def model_config(setting: Setting, encoder_level: int) -> VlmConfig:
    """The uncompressed model. Its decoder is that of the comparison with another vocabulary."""
    return VlmConfig(
        encoder=setting.vision,
        decoder=dataclasses.replace(setting.text, vocab_size=VOCABULARY, attention_bias=True),
        projector=MlpConfig(),
        image=single_tile(PAGE.side),
        vision_feature_layer=encoder_level,
    )


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
    """Trains the uncompressed model in four stages."""
    model = new_staged(setting, stages)
    losses: list[tuple[str, Loss, Schedule]] = [
        ("alignment", alignment_loss, stages.alignment),
        ("focus", partial(focus_loss, kept=stages.kept), stages.focus),
        ("reading", reading_loss, stages.reading),
        ("noise", partial(noise_loss, kept=stages.kept), stages.noise),
    ]
    for name, loss, schedule in losses:
        trainer: Trainer[VisionLanguageModel] = Trainer(loss, schedule)
        count = rows.before.shape[0]
        model = trainer.train(model, rows, count, seed=SEED, log=lambda line, name=name: log(f"{name}, {line}"))
    return model


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
* **Qwen2**: {text_layers} layers of {text_width} channels, {text_count:,} parameters; {steps} steps with
  patches as vision tokens. In the last ones the tokens are few, and mixed with each other and with noise. With a
  projector that is thrown away it answers {questions:.1%} of the questions about held-out pages, and names
  {captions:.1%} of what their captions name.
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
    schedules = (stages.alignment, stages.focus, stages.reading, stages.noise)
    card = CARD.format(
        minutes=sum(float((workdir / f"{part}.seconds").read_text()) for part in ("encoder", "decoder")) / 60,
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
