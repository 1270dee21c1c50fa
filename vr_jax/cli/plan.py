"""What a recipe needs on a pod, compiled ahead of time with no device: memory, work, the bound on its speed.

    python -m vr_jax.plan --config=configs/llava_vr_qwen2_7b.py:phase2 --topology=v5e:16x16 [--config.batch.rows=512]

docs/plan.md says what each number is."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from vr_jax.model.config import ConfigError
from vr_jax.output_folder import OutputError, directory_lock
from vr_jax.plan import report
from vr_jax.plan.errors import PlanError
from vr_jax.plan.inference import Request, plan_inference
from vr_jax.plan.recipes import PREFIX, recipe_of, sets
from vr_jax.plan.results import Plan
from vr_jax.plan.search import search
from vr_jax.plan.topology import EXAMPLES, open_topology, prepare_process
from vr_jax.plan.training import plan_training
from vr_jax.settings.config_files import RecipeError
from vr_jax.sharding import ShardingError
from vr_jax.training.inputs import InputError
from vr_jax.training.optimizer import OptimizerError
from vr_jax.training.state import TrainableError

USER_ERRORS = (
    PlanError,
    ConfigError,
    InputError,
    OptimizerError,
    OutputError,
    RecipeError,
    ShardingError,
    TrainableError,
)
EXIT_USAGE, EXIT_DOES_NOT_FIT = 2, 3


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vr_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Fields of the recipe are set as for train.py: --config.batch.rows=64",
    )
    known = Request()
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a recipe of train.py")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=EXAMPLES)
    parser.add_argument("--mode", choices=("train", "prefill", "decode"), default="train", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"for {report.JSON} and {report.MARKDOWN}")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")
    parser.add_argument(
        "--efficiency", type=float, default=0.6, help="share of the bound's speed that is reached (%(default)s)"
    )
    parser.add_argument("--samples", type=int, help="of an epoch; default: the paper's 558K or 779K")
    parser.add_argument(
        "--optimization_level",
        choices=("O0", "O1", "O2", "O3"),
        help="XLA's effort; O1 compiles about three times faster, with more memory traffic. Default: as runs do",
    )
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and micro-batches")
    parser.add_argument("--budget", type=float, default=600, help="seconds for --search (%(default)s)")
    parser.add_argument("--batch", type=int, default=known.batch, help="prompts, of prefill and decode (%(default)s)")
    for name, help_text in (
        ("text_tokens", "tokens of a prompt that are not the image's"),
        ("new_tokens", "room for answers in the cache"),
        ("cache_tokens", "slots of the cache instead of prompt + new_tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(known, name), help=f"{help_text} (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for wrong input, in one line on standard error; 3 if it does not fit."""
    options, rest = parser().parse_known_args(arguments)
    if unknown := [argument for argument in rest if not argument.startswith(PREFIX)]:
        parser().error(f"unknown argument {unknown[0]}")
    try:
        prepare_process(options.topology)
        plans = run(options, rest)
    except (*USER_ERRORS, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("plan: interrupted", file=sys.stderr)
        return 130
    return EXIT_DOES_NOT_FIT if plans[0].memory.fits is False else 0


def run(options: argparse.Namespace, overrides: Sequence[str]) -> list[Plan]:
    """Plans, prints, writes; the best plan first. Raises USER_ERRORS, and OSError."""
    if not 0 < options.efficiency <= 1:
        raise PlanError(f"--efficiency={options.efficiency}: expected a share in (0, 1]")
    config = recipe_of(options.config, overrides)
    topology = open_topology(options.topology)
    effort = options.optimization_level
    with contextlib.ExitStack() as held:
        if options.output is not None:
            held.enter_context(directory_lock(options.output, report.JSON, overwrite=options.overwrite))
        if options.search:
            if options.mode != "train":
                raise PlanError("--search is for --mode=train")
            found = search(
                options.config,
                config,
                topology,
                budget=options.budget,
                efficiency=options.efficiency,
                samples=options.samples,
                fixed_rows=sets(overrides, "batch.rows"),
                effort=effort,
                say=lambda line: print(f"plan: {line}", file=sys.stderr, flush=True),
            )
            plans, page = found.plans, found.markdown()
            print(found.text())
        else:
            if options.mode == "train":
                plan = plan_training(
                    options.config,
                    config,
                    topology,
                    efficiency=options.efficiency,
                    samples=options.samples,
                    fixed_rows=sets(overrides, "batch.rows"),
                    effort=effort,
                )
            else:
                request = Request(
                    batch=options.batch,
                    text_tokens=options.text_tokens,
                    new_tokens=options.new_tokens,
                    cache_tokens=options.cache_tokens,
                )
                plan = plan_inference(options.config, config, topology, options.mode, request, effort=effort)
            plans, page = [plan], report.markdown(plan)
            print(report.text(plan))
        if options.output is not None:
            report.write(options.output, plans, page)
            print(f"\n{options.output / report.MARKDOWN}, {report.JSON}")
    return plans


if __name__ == "__main__":
    sys.exit(main())
