"""Measures how much of a training batch is used, and compares packed rows with one sample per row.

    python -m benchmarks.input.packing [--samples 8000] [--size 0.5b]
    python -m benchmarks.input.packing --step [--rounds 5]
    python -m benchmarks.input.packing --data FILE [--images DIR] --tokenizer DIR

The script prints two numbers for the ratios 1/1, 1/4, 1/9 and 1/16, with the batch shapes of the config files' two
phases:

1. The share of the token slots and of the tile slots that are in use.
2. How many times as many samples per second packed rows train as three ways to pad. It follows from the model FLOPs of
   all slots, used or not.

With --step the script also times training steps of a small model on this machine. With --data it measures a real data
set; it reads the sizes of the images from the headers of their files.

LLaVA-NeXT-Data (779,289 samples) itself is not part of this repository, so without --data the sizes are drawn from
`MIXTURE`. Its numbers of samples are those of LLaVA-1.5's 665K (its paper, Table 7) without TextCaps, and those that
the card of lmms-lab/LLaVA-NeXT-Data adds. The card gives 136K samples for several sets together, which are divided in
proportion to the published sizes of those sets. Images have the usual sizes of each set. The numbers of turns and the
lengths of text are assumptions.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from benchmarks import arguments
from benchmarks.timing import side_by_side
from vr_jax import experiments, sharding
from vr_jax.data import anyres
from vr_jax.data.collate import collate
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.sources import open_source
from vr_jax.data.types import Conversation, Example
from vr_jax.model.batch import NO_CELL, Batch, BatchShape
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model_directory import warm_start
from vr_jax.settings import TrainConfig, load_config
from vr_jax.training import ModelTree, StepFlops, TrainState, build_program, create_state, put_batch, step_flops

STRIDES = (1, 2, 3, 4)
SYSTEM, TURN = 11, 10  # ChatML adds so many tokens for the system message, and for a question with its answer.
LONGEST_TEXT = 2048  # LLaVA cut ShareGPT's conversations to so many tokens.


@dataclass(frozen=True)
class Part:
    """A part of the mixture.

    Attributes:
        name: The name of the data set.
        thousands: Its number of samples in thousands.
        images: The kind of its images, a key of `COMMON_SIZES` or `UNIFORM_SIZES`, or "web"; None for text only.
        turns: The fewest and the most pairs of question and answer in a sample.
        question: The mean number of tokens of a question.
        answer: The mean number of tokens of an answer.
        spread: The sigma of the log-normal distribution of both.
    """

    name: str
    thousands: int
    images: str | None
    turns: tuple[int, int]
    question: float
    answer: float
    spread: float


MIXTURE = (
    Part("LLaVA conversation", 58, "coco", (2, 6), 12, 30, 0.5),
    Part("LLaVA detail", 23, "coco", (1, 1), 15, 130, 0.3),
    Part("LLaVA reasoning", 77, "coco", (1, 1), 18, 130, 0.3),
    Part("ShareGPT", 40, None, (1, 8), 60, 220, 0.9),
    Part("VQAv2", 83, "coco", (3, 8), 9, 2, 0.3),
    Part("GQA", 72, "genome", (5, 20), 11, 1, 0.3),
    Part("OKVQA", 9, "coco", (1, 1), 20, 2, 0.3),
    Part("OCR-VQA", 80, "cover", (3, 6), 9, 6, 0.5),
    Part("A-OKVQA", 66, "coco", (1, 1), 45, 2, 0.3),
    Part("RefCOCO", 49, "coco", (1, 10), 20, 14, 0.4),
    Part("Visual Genome", 86, "genome", (5, 12), 22, 18, 0.4),
    Part("DocVQA", 10, "document", (1, 8), 14, 6, 0.5),
    Part("SynDog-EN", 30, "synthetic", (1, 1), 15, 150, 0.6),
    Part("ChartQA", 18, "chart", (1, 3), 22, 3, 0.4),
    Part("DVQA", 20, "plot", (1, 3), 20, 3, 0.3),
    Part("AI2D", 12, "diagram", (1, 3), 45, 2, 0.4),
    Part("LAION-GPT-V", 11, "web", (1, 1), 20, 220, 0.4),
    Part("ShareGPT4V", 20, "web", (1, 1), 12, 190, 0.35),
    Part("demo users", 15, "web", (1, 3), 30, 200, 0.6),
)
# The sizes (width, height) of images, the shares of these sizes, and the share of images turned to portrait format.
COMMON_SIZES = {
    "coco": ([(640, 480), (640, 427), (640, 426), (640, 360), (640, 500)], [0.4, 0.3, 0.05, 0.1, 0.15], 0.27),
    "genome": ([(500, 375), (500, 333), (800, 600), (1024, 768), (640, 480)], [0.35, 0.2, 0.25, 0.1, 0.1], 0.25),
    "chart": ([(800, 557), (850, 600), (320, 400)], [0.8, 0.15, 0.05], 0.0),
    "plot": ([(448, 448)], [1.0], 0.0),
}
UNIFORM_SIZES = {  # The limits of width and of height, each of which is uniform between them.
    "cover": ((300, 400), (500, 501)),
    "document": ((1200, 2000), (1600, 2400)),
    "synthetic": ((600, 1600), (600, 1600)),
    "diagram": ((250, 1400), (250, 1100)),
}
CAPTION = (14.0, 0.45)  # The mean number of tokens of a BLIP caption in phase 1, and the sigma of the logarithm.


@dataclass(frozen=True)
class Sample:
    """The size of a sample before its image is cut into tiles.

    Attributes:
        text: Tokens of text.
        image: Width and height of the image in pixels, or None without an image.
    """

    text: int
    image: tuple[int, int] | None

    def size(self, config: VlmConfig) -> tuple[int, int]:
        """The numbers of tokens and of tiles under the tiling and the ratio of a model."""
        if self.image is None:
            return self.text, 0
        layout = anyres.layout(self.image, config.cells_per_side, config.image)
        return self.text + len(layout.cell), layout.tiles


def mixture(count: int, seed: int = 0) -> list[Sample]:
    """Draws samples of `MIXTURE` in random order."""
    rng = np.random.default_rng(seed)
    shares = np.asarray([part.thousands for part in MIXTURE], float)
    return [_sample(MIXTURE[k], rng) for k in rng.choice(len(MIXTURE), count, p=shares / shares.sum())]


def _sample(part: Part, rng: np.random.Generator) -> Sample:
    """Draws a sample of one part."""
    turns = int(rng.integers(part.turns[0], part.turns[1] + 1))
    words = sum(_lengths(mean, part.spread, turns, rng).sum() for mean in (part.question, part.answer))
    text = SYSTEM + TURN * turns + int(words)
    if part.images is None:
        return Sample(min(text, LONGEST_TEXT), None)
    return Sample(text + 1, _image(part.images, rng))  # One token is the newline after <image>.


def _lengths(mean: float, spread: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws log-normal lengths of texts with the given mean, at least 1 each."""
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.maximum(1, np.round(drawn)).astype(int)


def _image(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    """Draws the width and the height of an image."""
    if kind in UNIFORM_SIZES:
        width, height = (int(rng.integers(*limits)) for limits in UNIFORM_SIZES[kind])
        return width, height
    if kind == "web":
        side = float(np.exp(rng.uniform(np.log(400), np.log(2000))))
        size, upright = (int(side), int(side * rng.uniform(0.5, 1))), 0.4
    else:
        sizes, shares, upright = COMMON_SIZES[kind]
        size = sizes[int(rng.choice(len(sizes), p=shares))]
    return size[::-1] if rng.random() < upright else size


def captions(count: int, seed: int = 0) -> list[int]:
    """Draws the numbers of tokens of phase 1's captions, each with the newline before it."""
    return (_lengths(*CAPTION, count, np.random.default_rng(seed)) + 1).tolist()


Sizes = Sequence[tuple[int, int]]  # The numbers of tokens and of tiles of each sample.


def packed(sizes: Sizes, shape: BatchShape, lookahead: int | None = None) -> list[list[list[int]]]:
    """Packs samples as the training pipeline does.

    Args:
        sizes: The sizes of the samples.
        shape: The shape of a batch.
        lookahead: The number of samples among which the packer chooses; default: that of training.

    Returns:
        The indices of the samples in each row of each complete batch.
    """
    packer = RowPacker(shape, lookahead=lookahead or 16 + 2 * shape.rows)
    batches = []
    for index, (tokens, tiles) in enumerate(sizes):
        packer.offer(IndexedExample(index, _example(index, tokens, tiles)))
        if packer.complete:
            batches.append([[int(example.id) for example in row] for row in packer.take()])
    return batches


def _example(index: int, tokens: int, tiles: int, side: int = 0) -> Example:
    """Makes an example of a given size that holds nothing, with tiles of side x side pixels."""
    nothing = np.zeros(tokens, bool)
    return Example(
        id=str(index),
        tokens=np.ones(tokens, np.int32),
        loss_mask=nothing,
        text_token_mask=nothing,
        vision_cell=np.full(tokens, NO_CELL, np.int32),
        tile_pixels=np.zeros((tiles, side, side, 3), np.uint8),
        tile_image=np.ones(tiles, np.int32),
        cells_per_tile=1,
    )


@dataclass(frozen=True)
class Use:
    """The slots of some rows and how many of them are used.

    Attributes:
        slots: Token slots and tile slots of all rows.
        used: The used ones of these.
        pairs: Pairs of query and key under the causal mask in all rows.
        samples: Number of samples.
    """

    slots: tuple[float, float]
    used: tuple[float, float]
    pairs: float
    samples: int

    def flops(self, step: StepFlops) -> float:
        """The FLOPs per sample of a training step over all slots.

        Those of the targets are left out, because they do not depend on how samples are put into rows.
        """
        total = step.per_token * self.slots[0] + step.per_tile * self.slots[1] + step.per_pair * self.pairs
        return total / self.samples


def use(sizes: Sizes, rows: Sequence[tuple[Sequence[int], int, int]]) -> Use:
    """Counts the slots of rows.

    Args:
        sizes: The sizes of all samples.
        rows: The indices of the samples of each row, and the token slots and the tile slots of the row.
    """
    numbers = [k for samples, _, _ in rows for k in samples]
    return Use(
        slots=(sum(tokens for _, tokens, _ in rows), sum(tiles for *_, tiles in rows)),
        used=tuple(sum(sizes[k][i] for k in numbers) for i in (0, 1)),  # type: ignore[arg-type]
        pairs=sum(tokens * (tokens + 1) / 2 for _, tokens, _ in rows),
        samples=len(numbers),
    )


def static(sizes: Sizes, tokens: int) -> Use:
    """Puts one sample into each row, where all rows have the same shape and hold the most tiles of any sample."""
    most = max(tiles for _, tiles in sizes)
    return use(sizes, [([k], tokens, most) for k in range(len(sizes))])


def dynamic(sizes: Sizes, groups: Sequence[Sequence[int]]) -> Use:
    """Puts one sample into each row and pads each group of samples to its longest one, as PyTorch code does.

    Images are encoded without padding.
    """
    return use(sizes, [([k], max(sizes[j][0] for j in group), sizes[k][1]) for group in groups for k in group])


def shuffled_groups(count: int, device: int = 4) -> list[range]:
    """Groups samples in their random order by `device`, the number of samples of one device."""
    return [range(begin, begin + device) for begin in range(0, count - device + 1, device)]


def sampler_groups(sizes: Sizes, devices: int = 8, device: int = 4) -> list[list[int]]:
    """Groups samples as LLaVA's sampler does (docs/design/methods.md#hyper-parameters).

    Samples without an image form groups of their own. Of every 32 samples, each of eight devices takes four, so that
    the total lengths are about the same: from the longest on, each sample goes to the device with the least tokens.
    """
    groups = []
    for alike in ([k for k, size in enumerate(sizes) if size[1]], [k for k, size in enumerate(sizes) if not size[1]]):
        for begin in range(0, len(alike) - devices * device + 1, devices * device):
            parts: list[list[int]] = [[] for _ in range(devices)]
            for k in sorted(alike[begin : begin + devices * device], key=lambda k: -sizes[k][0]):
                open_parts = [part for part in parts if len(part) < device]
                min(open_parts, key=lambda part: sum(sizes[j][0] for j in part)).append(k)
            groups += parts
    return groups


def config_of(stride: int, size: str, phase: str) -> TrainConfig:
    """The configuration of the paper's system with windows of stride x stride patches."""
    row = {1: "table4/uncompressed", 2: "table2/ratio4_vr", 3: "table2/ratio9_vr", 4: "table2/ratio16_vr"}[stride]
    return load_config(f"configs/tables/paper.py:{row}/{size}/{phase}")


def table(config: TrainConfig, sizes: Sizes, name: str) -> str:
    """Compares packed rows with the three ways to pad.

    Args:
        config: The configuration, with the shape of a batch.
        sizes: The sizes of the samples. Samples that do not fit into a row are left out.
        name: The title of the table.

    Returns:
        The table as text.

    Raises:
        SystemExit: The samples do not fill one batch.
    """
    model = config.model
    step = step_flops(model, ModelTree(model).trainable(config.trainable))
    shape = BatchShape(rows=config.batch.rows, tokens=config.batch.tokens, tiles=config.batch.tiles, tile_size=0)
    fitting = [size for size in sizes if size[0] <= shape.tokens and size[1] <= shape.tiles]
    batches = packed(fitting, shape)
    if not batches:
        raise SystemExit(f"{name}: {len(fitting)} samples do not fill one batch; give more samples")
    ours = use(fitting, [(row, shape.tokens, shape.tiles) for batch in batches for row in batch])
    others = {
        f"one sample per row of {shape.tokens}": static(fitting, shape.tokens),
        "PyTorch, four padded to the longest": dynamic(fitting, shuffled_groups(len(fitting))),
        "PyTorch, grouped by LLaVA's sampler": dynamic(fitting, sampler_groups(fitting)),
    }
    tokens, tiles = (statistics.fmean(size[i] for size in sizes) for i in (0, 1))
    lines = [
        f"{name}: {tokens:.0f} tokens and {tiles:.2f} tiles a sample; rows {shape.rows} x {shape.tokens} tokens x "
        f"{shape.tiles} tiles; {len(sizes) - len(fitting)} of {len(sizes)} samples do not fit",
        f"  {'':<42} {'tokens used':>11} {'tiles used':>11} {'samples/step':>13} {'packed is':>10}",
        _line("packed", ours, ours.samples / len(batches), None),
    ]
    for label, other in others.items():
        lines.append(_line(label, other, None, other.flops(step) / ours.flops(step)))
    return "\n".join(lines)


def _line(label: str, one: Use, samples: float | None, ratio: float | None) -> str:
    """A row of the table."""
    shares = [100 * used / slots if slots else 100.0 for used, slots in zip(one.used, one.slots, strict=True)]
    return (
        f"  {label:<42} {shares[0]:>9.1f} % {shares[1]:>9.1f} % {'' if samples is None else f'{samples:.1f}':>13} "
        f"{'' if ratio is None else f'x {ratio:.2f}':>10}"
    )


def read(options: argparse.Namespace, model: VlmConfig) -> list[tuple[int, int]]:
    """Measures a random choice of the samples in the data set of `options.data`."""
    source = open_source(options.data, images=options.images or None)
    processor = Processor(AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True), model)
    sizes, skipped = [], 0
    for index in np.random.default_rng(0).permutation(len(source))[: options.samples].tolist():
        record = source[index]
        try:
            if not isinstance(record, Conversation):
                raise SkipRecord(record.reason, record.detail)
            sizes.append(processor.size(record))
        except SkipRecord:
            skipped += 1
    print(f"{options.data}: {len(sizes)} samples measured, {skipped} cannot be used")
    return sizes


def small_config() -> TrainConfig:
    """The configuration of phase 2 at 1/9 with a small encoder and a small decoder.

    A tile has 24 x 24 patches. The ratio of the encoder's FLOPs per tile to the decoder's per token is about that of
    SigLIP-L and Qwen2-0.5B, which is 511.
    """
    model = VlmConfig(
        encoder=SiglipConfig(
            hidden_size=192, intermediate_size=768, num_layers=3, num_heads=3, image_size=48, patch_size=2
        ),
        decoder=Qwen2Config(
            vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=2, num_heads=4, num_kv_heads=2
        ),
        projector=PoolConfig(stride=3),
        refusion=VisionRememberConfig(insert_after=(1,), levels=(1, 2, 3), cross_heads=3),
        vision_feature_layer=3,
        image=experiments.IMAGES["anyres9"](48),
    )
    return TrainConfig(model=model, trainable=("decoder.*", "refusion.*", "projector.*", "image_newline"))


def measured_step(sizes: Sizes, tokens: int, tiles: int, rounds: int) -> str:
    """Times a training step of `small_config` with the samples of one packed row.

    It is compared with a step in which each of these samples has a row of its own.

    Args:
        sizes: The sizes of the samples to pack.
        tokens: Token slots of a row.
        tiles: Tile slots of the packed row.
        rounds: Timed steps of each.

    Returns:
        The times as text, with the ratio that the FLOPs of the slots give in brackets.
    """
    config = small_config()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = build_program(config, mesh, 100)
    side = program.model.image.tile_size
    shape = BatchShape(rows=1, tokens=tokens, tiles=tiles, tile_size=side)
    (row,) = packed(sizes, shape)[0]
    most = max(tiles for _, tiles in sizes)
    alternatives = {
        "packed": (shape, [row]),
        "one sample per row": (
            BatchShape(rows=len(row), tokens=tokens, tiles=most, tile_size=side),
            [[k] for k in row],
        ),
    }
    step = step_flops(program.model, program.trainable)
    calls, flops = {}, {}
    with jax.set_mesh(mesh):
        model, _ = warm_start([], program.model, mesh)
        start = create_state(program.tree, program.optimizer, program.abstract, model)
        for name, (shape, rows) in alternatives.items():
            host = collate([[_example(k, *sizes[k], side) for k in numbers] for numbers in rows], shape)
            batch = put_batch(host.batch, mesh)
            calls[name] = _Repeated(program.step.lower(start, batch).compile(), jax.tree.map(jnp.copy, start), batch)
            slots = {"tokens": shape.rows * shape.tokens, "tiles": shape.rows * shape.tiles}
            # XLA on a CPU multiplies the whole square of queries and keys, of which the mask leaves half.
            flops[name] = step.total(**slots, pairs=shape.rows * shape.tokens**2, targets=0)
        timings = side_by_side(calls, rounds=rounds, warmup=1)
    ratios = {name: timing.median / timings["packed"].median for name, timing in timings.items()}
    lines = [f"train step of a small model, {len(row)} samples (in brackets: by the FLOPs of its slots)"]
    lines += [
        f"  {name:<20} {timing}   x {ratios[name]:.2f} of packed (x {flops[name] / flops['packed']:.2f})"
        for name, timing in timings.items()
    ]
    return "\n".join(lines)


class _Repeated:
    """Calls a training step repeatedly, each time on the state that it returned, because a step donates its state."""

    def __init__(self, step: Callable, state: TrainState, batch: Batch):
        self._step, self._state, self._batch = step, state, batch

    def __call__(self) -> object:
        self._state, metrics = self._step(self._state, self._batch)
        return metrics


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--samples", type=int, default=8000, help="number of samples")
    flags.add_argument("--seed", type=int, default=0, help="seed of the drawn samples")
    flags.add_argument("--size", choices=sorted(experiments.DECODERS), default="0.5b", help="size of the decoder")
    flags.add_argument("--step", action="store_true", help="also time training steps of a small model")
    flags.add_argument("--rounds", type=int, default=5, help="timed steps of each alternative")
    flags.add_argument(
        "--data",
        type=lambda text: str(arguments.path(text)),
        help="file, folder or glob pattern of a data set (docs/data.md)",
    )
    flags.add_argument("--images", type=lambda text: str(arguments.path(text)), help="folder of the images of --data")
    flags.add_argument(
        "--tokenizer", type=lambda text: str(arguments.path(text)), help="folder of the tokenizer for --data"
    )
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables of both phases, and the timed steps if they are asked for."""
    options = parser().parse_args(arguments)
    if options.data and not options.tokenizer:
        parser().error("--data needs --tokenizer")
    samples = [] if options.data else mixture(options.samples, options.seed)
    for stride in STRIDES:
        config = config_of(stride, options.size, "phase2")
        model = config.model
        sizes = read(options, model) if options.data else [sample.size(model) for sample in samples]
        print(table(config, sizes, f"phase 2, {options.size}, 1/{stride**2}"))
        if options.step and stride == 3:
            print(measured_step(sizes, config.batch.tokens, config.batch.tiles, options.rounds))
    if options.data:
        return
    for stride in STRIDES:
        config = config_of(stride, options.size, "phase1")
        cells = config.model.cells_per_tile
        sizes = [(cells + tokens, 1) for tokens in captions(options.samples, options.seed)]
        print(table(config, sizes, f"phase 1, {options.size}, 1/{stride**2}"))


if __name__ == "__main__":
    main()
