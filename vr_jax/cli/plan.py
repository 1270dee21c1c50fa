"""`vr-jax plan`: what a run needs on a pod, compiled ahead of time with no device."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.cli.shared import CONFIG_HELP, read_image_size
from vr_jax.errors import UserError
from vr_jax.fields import NoEffect, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.plan import report
from vr_jax.plan.inference import Request, plan_inference
from vr_jax.plan.results import Plan
from vr_jax.plan.search import search
from vr_jax.plan.topology import EXAMPLES, Topology, open_topology, prepare_process
from vr_jax.plan.training import plan_training
from vr_jax.settings import TRAINING, TrainConfig, load_config
from vr_jax.storage import as_path, results_folder

EXIT_DOES_NOT_FIT = 3


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Flags):
    """The flags of `vr-jax plan`."""

    no_effect: ClassVar = (
        NoEffect(("overwrite",), "output", lambda flags: flags.output is None, "nothing is written without it"),
        NoEffect(("budget",), "search", lambda flags: not flags.search, "it bounds the time of the search"),
        NoEffect(
            ("batch", "image_size", "text_tokens", "new_tokens", "cache_tokens"),
            "mode",
            lambda flags: flags.mode == "train",
            "they are the prompts of prefill and decode; the batch of training is in the config",
        ),
        NoEffect(
            ("samples", "efficiency"), "mode", lambda flags: flags.mode != "train", "they tell the days of an epoch"
        ),
    )

    config: FileVariantText = flag(help=CONFIG_HELP, metavar="FILE[:VARIANT]")
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    topology: str = flag(help=f"The devices: {EXAMPLES}.", metavar="CHIP:SHAPE")
    mode: Literal["train", "prefill", "decode"] = flag("train", "The program to plan.")
    output: PathText | None = flag(None, f"Folder for {report.JSON} and {report.MARKDOWN}.", metavar="DIR")
    overwrite: bool = flag(False, "Replace the results in --output.")
    efficiency: PositiveFraction = flag(0.6, "Share of the bound's speed that a run is taken to reach.")
    samples: PositiveInt | None = flag(None, "Samples of an epoch. The default is the paper's 558K or 779K.")
    optimization_level: Literal["O0", "O1", "O2", "O3"] | None = flag(
        None,
        "Effort of XLA. O1 compiles about three times faster and counts more memory traffic. "
        "The default is that of training.",
    )
    search: bool = flag(False, "Try meshes, remat policies and micro-batches.")
    budget: PositiveFloat = flag(600.0, "Seconds for --search.")
    batch: PositiveInt = flag(Request.batch, "Prompts of prefill and decode.")
    image_size: str | None = flag(
        None,
        "Size of the image of a prompt, of prefill and decode. The default fills the model's largest grid.",
        metavar="WIDTHxHEIGHT",
    )
    text_tokens: NonNegativeInt = flag(
        Request.text_tokens, "Tokens of a prompt that are not the image's, of prefill and decode."
    )
    new_tokens: PositiveInt = flag(
        Request.new_tokens, "Tokens of an answer that the cache has room for, of prefill and decode."
    )
    cache_tokens: NonNegativeInt = flag(
        Request.cache_tokens, "Slots of the cache; 0 takes those of the prompt and the answer."
    )


def run(flags: PlanFlags) -> int:
    """Plans, prints and writes; the exit status says whether the best plan fits."""
    prepare_process(flags.topology)
    if flags.search and flags.mode != "train":
        raise UserError(f"--search is for --mode=train, found --mode={flags.mode}")
    config = load_config(flags.config, flags.overrides, sections=TRAINING)
    topology = open_topology(flags.topology)
    with contextlib.ExitStack() as held:
        if flags.output is not None:
            held.enter_context(results_folder(flags.output, report.JSON, report.MARKDOWN, overwrite=flags.overwrite))
        fixed_rows = any(override.startswith("batch.rows=") for override in flags.overrides)
        if flags.search:
            found = search(
                flags.config,
                config,
                topology,
                budget=flags.budget,
                efficiency=flags.efficiency,
                samples=flags.samples,
                fixed_rows=fixed_rows,
                effort=flags.optimization_level,
                say=lambda line: print(f"plan: {line}", file=sys.stderr, flush=True),
            )
            plans, page = found.plans, found.markdown()
            print(found.text())
        else:
            plan = _plan(flags, config, topology, fixed_rows)
            plans, page = [plan], report.markdown(plan)
            print(report.text(plan))
        if flags.output is not None:
            report.write(as_path(flags.output), plans, page)
            print(f"\n{as_path(flags.output) / report.MARKDOWN}, {report.JSON}")
    return EXIT_DOES_NOT_FIT if plans[0].memory.fits is False else 0


def _plan(flags: PlanFlags, config: TrainConfig, topology: Topology, fixed_rows: bool) -> Plan:
    if flags.mode == "train":
        return plan_training(
            flags.config,
            config,
            topology,
            efficiency=flags.efficiency,
            samples=flags.samples,
            fixed_rows=fixed_rows,
            effort=flags.optimization_level,
        )
    request = Request(
        batch=flags.batch,
        image_size=read_image_size(flags.image_size),
        text_tokens=flags.text_tokens,
        new_tokens=flags.new_tokens,
        cache_tokens=flags.cache_tokens,
    )
    return plan_inference(flags.config, config, topology, flags.mode, request, effort=flags.optimization_level)


COMMAND = Command(
    summary="Compile a run for devices nobody holds: memory, FLOPs, time.",
    flags=PlanFlags,
    run=run,
    details="""The update that `vr-jax train` runs is compiled for the topology; no device is needed. Compilers:
    pip install 'vr-jax[tpu]' or 'vr-jax[cuda13]'.

    Exit code 3 means that the plan does not fit into the devices' memory.""",
    examples=(
        "vr-jax plan --config=configs/llava_vr_qwen2_7b.py:phase2 --topology=v5e:16x16 "
        "--config.batch.raise_rows=keep_lr",
    ),
)
