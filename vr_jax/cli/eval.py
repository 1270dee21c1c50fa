"""`vr-jax eval`: scores a checkpoint on benchmarks."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax

from vr_jax import distributed
from vr_jax.cli.flags import Command, flag
from vr_jax.cli.shared import DTYPE_HELP, WEIGHTS_HELP, DType, ProcessFlags, Weights, start_processes
from vr_jax.compilation import use_compilation_cache
from vr_jax.evaluation import Profile, evaluate, score_table, write_run_report
from vr_jax.fields import NoEffect, NonNegativeInt, PositiveFloat, PositiveInt
from vr_jax.inference import memory_errors
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.settings import EvaluationSettings, TrainConfig, load_config

_SECTIONS = ("model", "mesh", "eval")  # what this command reads of a config
EXIT_INCOMPLETE = 1  # some of the benchmarks could not be run


@dataclass(frozen=True, kw_only=True)
class EvalFlags(ProcessFlags):
    """The flags of `vr-jax eval`. Those that are None leave the choice to the config's `eval` section."""

    no_effect: ClassVar = (
        NoEffect(("overrides",), "config", lambda flags: flags.config is None, "it sets a field of a config; give one"),
    )

    checkpoint: PathText | None = flag(None, "Model directory: what `train`, `convert`, `demo` write.", metavar="DIR")
    benchmark: str | None = flag(
        None,
        "Names with commas between, e.g. chartqa,docvqa, or `all` for the paper's eleven. NAME=FILE:METRIC stands for "
        "your own questions, in JSONL or LLaVA's format; without a metric, exact.",
        metavar="NAMES",
    )
    images: PathText | None = flag(
        None, "Folder of the images of your own questions. The default is the folder of their file.", metavar="DIR"
    )
    follow_links: bool | None = flag(None, "Lets links in that folder lead out of it.")
    config: FileVariantText | None = flag(
        None,
        "Config file, or a packaged one. Its model, mesh and eval sections are used.",
        metavar="FILE[:VARIANT]",
    )
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    data: PathText | None = flag(
        None,
        "Folder with the published parquet files, or JSONL. Several benchmarks have a folder each in it. "
        "The default is the Hugging Face hub.",
        metavar="DIR",
    )
    output: PathText | None = flag(
        None, "Folder for the results, with a folder for each benchmark. The default is CHECKPOINT/eval.", metavar="DIR"
    )
    split: str | None = flag(None, "Split of the data. The default is the published one.")
    profile: Profile | None = flag(
        None, "Scoring rules: those of lmms-eval 0.7.3 (default) or of its version 0.5.0 (v0.5)."
    )
    limit: PositiveInt | None = flag(None, "Asks only the first items.")
    batch_size: PositiveInt | None = flag(None, "Items in a batch, over all devices. The default is 16.")
    max_new_tokens: PositiveInt | None = flag(None, "Longest answer, in tokens. The default is the benchmark's.")
    repetition_penalty: PositiveFloat | None = flag(
        None, "Penalty for tokens that occurred; 1 is none. The default is that of generation_config.json."
    )
    dtype: DType | None = flag(None, DTYPE_HELP)
    weights: Weights | None = flag(None, WEIGHTS_HELP)
    pruning: str | None = flag(
        None, "Drops vision tokens: the name of a pruner, or a JSON object with its fields.", metavar="NAME|JSON"
    )
    report_items: NonNegativeInt | None = flag(
        None, "Items that report.html shows; 0 writes no report. The default is 500."
    )
    overwrite: bool | None = flag(None, "Discards the results of an earlier run in the output folder.")


_OWN = ("config", "overrides", *(one.name for one in dataclasses.fields(ProcessFlags)))


def run(flags: EvalFlags) -> int:
    """Evaluates, writes the report and prints the scores."""
    start_processes(flags)
    use_compilation_cache()
    config, settings = distributed.together(lambda: _settings(flags))
    distributed.check_same({"settings": settings.to_dict(), "config": config.to_dict() if config else {}})
    model, mesh = (config.model, config.mesh) if config else (None, None)
    with memory_errors(), Interrupt() as interrupt:
        done = evaluate(settings, model=model, mesh=mesh, on_batch=interrupt.check)
    if jax.process_index() == 0:
        if done.summaries:
            print(score_table(done.summary))
            print("\n".join(map(_throughput, done.summaries.values())))
            if settings.report_items:
                print(f"report: {write_run_report(done)}")
        for name, path in done.predictions.items():
            print(f"{name}: these data have no reference answers, so there is no score; predictions to submit: {path}")
    for name, problem in done.failures.items():  # once more, where it is seen
        print(f"vr-jax eval: {name} was not run: {problem}", file=sys.stderr)
    return EXIT_INCOMPLETE if done.failures else 0


def _settings(flags: EvalFlags) -> tuple[TrainConfig | None, EvaluationSettings]:
    config = load_config(flags.config, flags.overrides, sections=_SECTIONS) if flags.config else None
    settings = settings_of(flags, config)
    return config, settings


def settings_of(flags: EvalFlags, config: TrainConfig | None) -> EvaluationSettings:
    """Returns the settings of the evaluation: flags that are set win over the config's `eval` section."""
    given = {name: value for name, value in vars(flags).items() if name not in _OWN and value is not None}
    return dataclasses.replace(config.eval if config else EvaluationSettings(), **given)


def _throughput(summary: Mapping[str, Any]) -> str:
    one = summary["throughput"]
    if one.get("measured_earlier"):
        return f"{summary['title']}: answered before, at {one['items_per_second']:.2f} items/s"
    return f"{summary['title']}: {one['items']} items in {one['seconds']:.1f} s, {one['items_per_second']:.2f} items/s"


class Interrupt:
    """Makes sure that Ctrl-C ends the evaluation.

    Python drops a KeyboardInterrupt that is raised inside a callback of JAX. `check`, which the evaluation calls after
    each batch, raises it again.
    """

    seen = False

    def __enter__(self) -> Self:
        """Takes over the signal, which only the main thread may do."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signal back."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def note(self, *_: object) -> None:
        """Handles the signal."""
        self.seen = True
        raise KeyboardInterrupt

    def check(self, _: object = None) -> None:
        """Raises KeyboardInterrupt if the signal came and its exception was lost."""
        if self.seen:
            raise KeyboardInterrupt


COMMAND = Command(
    summary="Score a checkpoint on benchmarks and write a report.",
    flags=EvalFlags,
    run=run,
    details="""A run that was interrupted continues with the same command. Exit code 1 means that some of several
    benchmarks could not be run.""",
    examples=(
        "vr-jax eval --checkpoint=runs/phase2/model --benchmark=chartqa,docvqa",
        "vr-jax eval --checkpoint=runs/phase2/model --benchmark=all --data=/data/benchmarks",
        "vr-jax eval --checkpoint=runs/phase2/model --benchmark=mine=questions.jsonl:anls,chartqa",
    ),
    interrupted="interrupted; the same command continues, without --overwrite",
)
