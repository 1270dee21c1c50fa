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

Without --data the sizes are drawn as `benchmarks/input/mixture.py` describes.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from transformers import AutoTokenizer

from benchmarks import arguments
from benchmarks.input.mixture import captions, mixture
from benchmarks.input.packed_step import Sizes, measured_step, packed
from vr_jax import experiments
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.sources import open_source
from vr_jax.data.types import Conversation
from vr_jax.model.batch import BatchShape
from vr_jax.model.config import VlmConfig
from vr_jax.settings import TrainConfig, load_config
from vr_jax.training import ModelTree, StepFlops, step_flops

STRIDES = (1, 2, 3, 4)


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
