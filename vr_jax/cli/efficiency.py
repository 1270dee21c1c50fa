"""`vr-jax efficiency`: measures the speed and the memory of several models side by side."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.cli.shared import DType, read_image_size
from vr_jax.compilation import use_compilation_cache
from vr_jax.efficiency import (
    JSON,
    MARKDOWN,
    PLOT,
    EfficiencySettings,
    Kind,
    Report,
    Source,
    measure,
    measure_isolated,
    parse_scores,
    read_systems,
    text,
    write,
)
from vr_jax.fields import MAX_INT, NoEffect, PositiveInt, Range
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.plotting import check_plotting
from vr_jax.storage import as_path, results_folder


@dataclass(frozen=True, kw_only=True)
class EfficiencyFlags(Flags):
    """The flags of `vr-jax efficiency`."""

    no_effect: ClassVar = (
        NoEffect(("overwrite",), "output", lambda flags: flags.output is None, "nothing is written without it"),
    )

    sources: tuple[tuple[str, FileVariantText], ...] = flag(
        help="A model: a config (FILE[:VARIANT], with random weights) or a model directory. "
        "Ratios are to the first one.",
        name=("config", "checkpoint"),
        metavar="MODEL",
    )
    score: tuple[str, ...] = flag(
        (),
        "Accuracy of a model, 0..100, or the summary.json that holds it; by name, or in the order of the models.",
        metavar="[NAME=]NUMBER|FILE",
    )
    output: PathText | None = flag(None, f"Folder for {JSON}, {MARKDOWN} and {PLOT}.", metavar="DIR")
    overwrite: bool = flag(False, "Replace the results in --output.")
    image: Literal["anyres4", "anyres9", "config"] = flag("anyres4", "Layout of the image.")
    image_size: str | None = flag(
        None, "Size of the image in pixels. The default fills the largest grid of the layout.", metavar="WIDTHxHEIGHT"
    )
    dtype: DType | None = flag(
        None, "Type of parameters and activations. The default is float32 on CPUs, else bfloat16."
    )
    text_tokens: PositiveInt = flag(
        EfficiencySettings.text_tokens, "Tokens of the prompt beside the image's, those of the chat template included."
    )
    new_tokens: Annotated[int, Range(2, MAX_INT)] = flag(EfficiencySettings.new_tokens, "Tokens that are generated.")
    batch_size: PositiveInt = flag(EfficiencySettings.batch_size, "Equal prompts that are answered together.")
    repeats: PositiveInt = flag(EfficiencySettings.repeats, "Measured runs of each model.")
    warmup: PositiveInt = flag(EfficiencySettings.warmup, "Runs before the measured ones.")
    buckets: bool = flag(False, "Pad prompts as chat and eval do. The default is not to pad.")
    isolate: bool = flag(False, "Measure each model in a process of its own, one after another.")


def run(flags: EfficiencyFlags) -> None:
    """Measures, prints and writes."""
    compare(flags)


def compare(flags: EfficiencyFlags) -> Report:
    """Measures, prints and writes; returns what was measured."""
    use_compilation_cache()
    sources = [Source(cast(Kind, kind), text) for kind, text in flags.sources]
    found = read_systems(sources, flags.image)
    scores = parse_scores(flags.score, [system.name for system in found])
    settings = EfficiencySettings(
        image=flags.image,
        image_size=read_image_size(flags.image_size),
        text_tokens=flags.text_tokens,
        new_tokens=flags.new_tokens,
        batch_size=flags.batch_size,
        repeats=flags.repeats,
        warmup=flags.warmup,
        dtype=flags.dtype,
        buckets=flags.buckets,
        isolated=flags.isolate,
    )
    with ExitStack() as held:
        if flags.output is not None:
            # Nothing is measured that could not be written.
            check_plotting()
            held.enter_context(results_folder(flags.output, JSON, MARKDOWN, PLOT, overwrite=flags.overwrite))
        how = measure_isolated if flags.isolate else measure
        result = how(found, settings, lambda line: print(f"efficiency: {line}", file=sys.stderr, flush=True))
        print(text(result, scores))
        if flags.output is not None:
            write(as_path(flags.output), result, scores)
            print(f"\n{as_path(flags.output) / MARKDOWN}, {JSON}, {PLOT}")
    return result


COMMAND = Command(
    summary="Compare time to first token, tokens per second and memory.",
    flags=EfficiencyFlags,
    run=run,
    examples=(
        "vr-jax efficiency --config=configs/demo.py --config=configs/demo.py:uncompressed --output=runs/efficiency",
        "vr-jax efficiency --checkpoint=runs/a/model --checkpoint=runs/b/model --score=42.9 --score=46.7",
    ),
)
