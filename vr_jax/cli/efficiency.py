"""Measures time to first token, decoding speed and device memory of several configs side by side.

    python -m vr_jax.efficiency --config=configs/llava_vr_qwen2_0_5b.py:phase2_baseline \\
        --config=configs/llava_vr_qwen2_0_5b.py:phase2 [--score=42.9 --score=46.7] --output=runs/efficiency

docs/efficiency.md says what each number is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vr_jax.compilation import use_compilation_cache
from vr_jax.efficiency import report
from vr_jax.efficiency.measure import measure, measure_isolated
from vr_jax.efficiency.results import EfficiencyError, Report, Settings
from vr_jax.efficiency.scores import parse_scores
from vr_jax.efficiency.systems import IMAGE_CHOICES, Kind, Source, systems
from vr_jax.inference.buckets import PromptTooLong
from vr_jax.inference.loading import LOADING_ERRORS
from vr_jax.output_folder import OutputError, directory_lock
from vr_jax.plotting import PlotError, check_plotting
from vr_jax.settings.config_files import RecipeError

USER_ERRORS = (EfficiencyError, OutputError, PlotError, PromptTooLong, RecipeError, *LOADING_ERRORS)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vr_jax.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = Settings()
    kinds: tuple[tuple[Kind, str, str], ...] = (
        ("config", "FILE[:VARIANT]", "a recipe, with random weights; may be repeated; ratios are to the first system"),
        ("checkpoint", "DIR", "a model directory; may be repeated, also between --config"),
    )
    for kind, metavar, text in kinds:
        parser.add_argument(
            f"--{kind}", dest="sources", action="append", type=partial(Source, kind), metavar=metavar, help=text
        )
    parser.add_argument(
        "--score",
        action="append",
        default=[],
        metavar="[NAME=]NUMBER|FILE",
        help="accuracy of a system, 0..100, or the summary.json that holds it; by name, or in order",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"for {report.JSON}, {report.MARKDOWN}, {report.PLOT}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")
    parser.add_argument("--image", choices=IMAGE_CHOICES, default=known.image, help="layout of the image (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, else bfloat16")
    for name, text in (
        ("text_tokens", "tokens of the prompt beside the image's, chat template included"),
        ("new_tokens", "tokens that are generated"),
        ("batch_size", "equal prompts at a time"),
        ("repeats", "measured runs of each system"),
        ("warmup", "runs before those"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(known, name), help=f"{text} (%(default)s)")
    parser.add_argument(
        "--buckets", action="store_true", help="pad prompts as chat and eval.py do (default: not at all)"
    )
    parser.add_argument("--isolate", action="store_true", help="a process for each system, one after another")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status. Wrong input is one clear line on standard error."""
    options = parser().parse_args(arguments)
    use_compilation_cache()
    try:
        run(options)
    except (*USER_ERRORS, OSError) as error:
        print(f"efficiency: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("efficiency: interrupted", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> Report:
    """Measures, prints, writes. Raises USER_ERRORS, and OSError for an output that cannot be written."""
    found = systems(options.sources or [], options.image)
    scores = parse_scores(options.score, [system.name for system in found])
    settings = Settings(
        image=options.image,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        repeats=options.repeats,
        warmup=options.warmup,
        dtype=options.dtype,
        buckets=options.buckets,
        isolated=options.isolate,
    )
    how = measure_isolated if options.isolate else measure
    with ExitStack() as held:
        if options.output is not None:  # what would not be written is not measured
            check_plotting()
            held.enter_context(directory_lock(options.output, report.JSON, overwrite=options.overwrite))
        result = how(found, settings, lambda line: print(f"efficiency: {line}", file=sys.stderr, flush=True))
        print(report.text(result, scores))
        if options.output is not None:
            report.write(options.output, result, scores)
            print(f"\n{options.output / report.MARKDOWN}, {report.JSON}, {report.PLOT}")
    return result


if __name__ == "__main__":
    sys.exit(main())
