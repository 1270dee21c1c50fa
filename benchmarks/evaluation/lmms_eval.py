"""Measures the throughput of evaluation on this machine, with 16 items at a time and with one at a time.

    python -m benchmarks.evaluation.lmms_eval [--rounds 3] [--items 96]

The two batch sizes take turns within one run. Items shaped like those of ChartQA go through
`vr_jax.evaluation.runner.evaluate_items`, which also writes its files. An item has a drawn chart of 850 x 600 pixels,
which AnyRes4 makes five tiles, and a question of 20 to 40 tokens. Every reply has 16 tokens, because no token ends it
early, so both batch sizes do the same work. The model is that of phase 2 of configs/real_charts.py with random weights.

The goals are at least 4 times as many items per second on two cores, and at most 10 % of the time outside the compiled
programs.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw

from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.interface import Item
from vr_jax.evaluation.runner import evaluate_items
from vr_jax.inference import Generator
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.settings import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "real_charts.py"
NEW_TOKENS = 16
SIZE = (850, 600)  # pixels, width and height


@dataclass(frozen=True)
class Pass:
    """One pass over all items.

    Attributes:
        seconds: The seconds of the whole evaluation.
        computing: The seconds of these in compiled programs, including the transfers to them.
    """

    seconds: float
    computing: float


def chart(number: int) -> bytes:
    """Draws a bar chart from the seed `number` and returns the bytes of a PNG file."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    bars = int(rng.integers(4, 12))
    width = (SIZE[0] - 120) / bars
    for bar, height in enumerate(rng.integers(40, SIZE[1] - 140, bars).tolist()):
        left = 80 + bar * width
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.rectangle((left, SIZE[1] - 60 - height, left + 0.7 * width, SIZE[1] - 60), fill=colour)
        draw.text((left, SIZE[1] - 50), f"item {bar}", fill="black")
        draw.text((left, SIZE[1] - 76 - height), str(height), fill="black")
    draw.line((70, 20, 70, SIZE[1] - 60, SIZE[0] - 30, SIZE[1] - 60), fill="black", width=2)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def items(count: int) -> list[Item]:
    """Makes items with a chart and a question of 20 to 40 digits.

    A digit is one token of the demo's tokenizer and of Qwen2's.
    """
    rng = np.random.default_rng(0)
    return [
        Item(
            id=str(number),
            question="".join(rng.choice(list("0123456789"), int(rng.integers(20, 41)))),
            answers=("1",),
            category="human",
            images=(chart(number),),
        )
        for number in range(count)
    ]


def build() -> tuple[Generator, Processor]:
    """Builds the model with random weights, and the processor of its prompts."""
    config = load_config(f"{CONFIG}:phase2").model
    model = jax.jit(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))()
    tokenizer = demo_tokenizer()
    return Generator(model, tokenizer, ignore_stop=True), Processor(tokenizer, config)


def one_pass(generator: Generator, processor: Processor, asked: list[Item], batch_size: int) -> Pass:
    """Evaluates all items once and returns the seconds.

    Raises:
        SystemExit: An item failed, or its reply ended early.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        evaluation = evaluate_items(
            generator,
            processor,
            get_benchmark("chartqa"),
            asked,
            Path(folder) / "run",
            batch_size=batch_size,
            max_new_tokens=NEW_TOKENS,
            progress=False,
        )
        seconds = time.perf_counter() - start
    wrong = [result.id for result in evaluation.results if result.error is not None or result.finish != "length"]
    if wrong:
        raise SystemExit(f"items {wrong[:5]} did not get {NEW_TOKENS} tokens")
    return Pass(seconds, evaluation.summary["throughput"]["seconds_computing"])


def spread(values: list[float], unit: str, digits: int = 2) -> str:
    """The median with the lowest and the highest value, as text."""
    return f"{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def report(passes: dict[int, list[Pass]], count: int) -> str:
    """The report as text.

    Args:
        passes: The timed passes of each batch size. One of the sizes is 1.
        count: The number of items in a pass.

    Returns:
        A line for each batch size, with the items per second and the share of time outside the compiled programs. The
        last line compares the largest batch size with 1.
    """
    lines = []
    for batch_size, runs in passes.items():
        rate = spread([count / run.seconds for run in runs], " items/s")
        outside = spread([100 * (1 - run.computing / run.seconds) for run in runs], " %", 1)
        lines.append(f"  batch {batch_size:>2}: {rate}; outside the compiled programs {outside}")
    largest = max(passes)
    ratios = [one.seconds / many.seconds for one, many in zip(passes[1], passes[largest], strict=True)]
    lines.append(f"  batch {largest} against one at a time: x {spread(ratios, '')}; goal x 4")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=3, help="passes of each batch size")
    flags.add_argument("--items", type=int, default=96, help="a multiple of 16 leaves no row empty")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Measures both batch sizes in turns and prints the report."""
    options = parser().parse_args(arguments)
    generator, processor = build()
    asked = items(options.items)
    passes: dict[int, list[Pass]] = {1: [], 16: []}
    for turn in range(options.rounds + 1):
        for batch_size, runs in passes.items():
            # The first turn compiles every bucket, so it needs all items too.
            found = one_pass(generator, processor, asked, batch_size)
            if turn > 0:
                runs.append(found)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"evaluation of {options.items} ChartQA-shaped items, {NEW_TOKENS} new tokens each")
    print(report(passes, options.items))


if __name__ == "__main__":
    main()
