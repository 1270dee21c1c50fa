"""What `eval.py` runs: a checkpoint on a benchmark, from flags and an optional recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vr_jax.evaluation.benchmarks import PAPER, get_benchmark
from vr_jax.evaluation.hub import data_folder
from vr_jax.evaluation.overall import finished, overall_summary, table
from vr_jax.evaluation.paper_scores import rows_of
from vr_jax.evaluation.processes import all_gather
from vr_jax.evaluation.report import ReportItem, write_report
from vr_jax.evaluation.report_items import report_items
from vr_jax.evaluation.run_directory import SUMMARY, write_json
from vr_jax.evaluation.runner import evaluate
from vr_jax.evaluation.types import Benchmark, EvaluationError, Item
from vr_jax.inference.generate import Generator
from vr_jax.inference.loading import LOADING_ERRORS, load_for_inference, with_pruning
from vr_jax.model.config import LlavaConfig
from vr_jax.model_directory import read_config
from vr_jax.sharding import make_mesh

REPORT = "report.html"
_SMALL_FILE = 1 << 16  # bytes

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, and how. Raises EvaluationError for a number that makes no sense."""

    checkpoint: Path
    benchmark: str  # names, separated by commas, or "all": those of the paper
    data: Path | None = None  # of one benchmark, or a folder with a folder for each; default: from the hub
    output: Path | None = None  # default: <checkpoint>/eval; each benchmark has a folder in it
    split: str | None = None  # default: the published one
    profile: str = "default"
    limit: int | None = None  # only the first items
    batch_size: int = 16
    max_new_tokens: int | None = None  # default: the benchmark's
    dtype: str | None = None
    overwrite: bool = False
    report_items: int = 500  # items that report.html shows; 0: no report
    pruning: str | Mapping[str, Any] | None = None  # see `with_pruning`
    model: LlavaConfig | None = None  # default: the checkpoint's config.json
    mesh: Mapping[str, int] = field(default_factory=dict)  # arguments of `make_mesh`

    def __post_init__(self):
        for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 1), ("report_items", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} = {value}: expected at least {least}")
        names = self.names
        if self.split is not None and len(names) > 1:
            raise EvaluationError(f"split = {self.split!r} with {len(names)} benchmarks: give it with one only")

    @property
    def names(self) -> tuple[str, ...]:
        """The benchmarks, in the order given. Raises EvaluationError for none, or one that is given twice."""
        names = tuple(name.strip() for name in self.benchmark.split(",") if name.strip())
        if names == ("all",):
            return PAPER
        if not names or len(set(names)) < len(names):
            raise EvaluationError(f"benchmark = {self.benchmark!r}: expected different names, separated by commas")
        return names

    @property
    def folder(self) -> Path:
        return self.output or self.checkpoint / "eval"


@dataclass(frozen=True)
class Run:
    """What `run` leaves behind: the overall summary, the full summaries by benchmark, items for a report, what went
    wrong with benchmarks that could not be run, and the model's config as it was run."""

    summary: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    report_items: list[ReportItem]
    failures: dict[str, str]
    config: LlavaConfig


def options_of(flags: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> EvalOptions:
    """Flags that are set (not None) win over the recipe's `eval` section, which wins over the defaults; its `model`
    and `mesh` sections are taken as they are. Raises EvaluationError for an unknown field of `eval`, and for a missing
    checkpoint or benchmark."""
    recipe = recipe or {}
    values = dict(recipe.get("eval") or {})
    fields = {one.name for one in dataclasses.fields(EvalOptions)} - {"model", "mesh"}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise EvaluationError(f"config.eval: unknown field(s) {unknown}; known: {sorted(fields)}")
    values |= {name: value for name, value in flags.items() if value is not None}
    for name in ("checkpoint", "data", "output"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if isinstance(values.get("pruning"), Mapping | ConfigDict):
        values["pruning"] = _plain(values["pruning"])
    if recipe.get("model"):
        values["model"] = LlavaConfig.from_dict(_plain(recipe["model"]))
    if recipe.get("mesh"):
        values["mesh"] = _plain(recipe["mesh"])
    missing = sorted({"checkpoint", "benchmark"} - set(values))
    if missing:
        raise EvaluationError("missing: " + ", ".join(f"--{name}" for name in missing))
    return EvalOptions(**values)


def run(options: EvalOptions) -> Run:
    """Answers and scores every benchmark, one after another; one that cannot be run does not keep the others from it.

    Raises EvaluationError or one of LOADING_ERRORS, each with a text for the user, also if no benchmark can be run."""
    benchmarks = [get_benchmark(name, options.profile) for name in options.names]
    config = _model_config(options)
    # What is wrong with the data is told before the model is loaded, as far as it shows by then.
    folders = {one.name: data_folder(one, options.data, several=len(benchmarks) > 1) for one in benchmarks}
    only = _items(benchmarks[0], folders[benchmarks[0].name], options) if len(benchmarks) == 1 else None
    mesh = make_mesh(**options.mesh)  # type: ignore[arg-type]
    loaded = load_for_inference(options.checkpoint, mesh, config=config, dtype=options.dtype)
    settings = {"checkpoint": {"path": str(options.checkpoint), "sha256": fingerprint(options.checkpoint)}}
    summaries: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    shown: list[ReportItem] = []
    with jax.set_mesh(mesh):
        generator = Generator(loaded.model, loaded.tokenizer)
        for number, benchmark in enumerate(benchmarks):
            try:
                evaluation = evaluate(
                    generator,
                    loaded.processor,
                    benchmark,
                    only or _items(benchmark, folders[benchmark.name], options),
                    options.folder / benchmark.name,
                    settings=settings,
                    batch_size=options.batch_size,
                    max_new_tokens=options.max_new_tokens,
                    overwrite=options.overwrite,
                )
            except EvaluationError as error:
                if len(benchmarks) == 1:
                    raise
                logger.error("%s", error)
                failures[benchmark.name] = str(error)
                continue
            summaries[benchmark.name] = evaluation.summary
            share = (options.report_items - len(shown)) // (len(benchmarks) - number)
            shown += report_items(evaluation, generator, loaded.processor, share, batch_size=options.batch_size)
    if not summaries:
        raise EvaluationError("no benchmark could be run:\n" + "\n".join(f"  {text}" for text in failures.values()))
    summary = overall_summary(finished(options.folder, like=next(iter(summaries.values()))) | summaries)
    if jax.process_index() == 0:
        write_json(options.folder / SUMMARY, summary)
    return Run(summary, summaries, shown, failures, config)


def _items(benchmark: Benchmark, data: Path | None, options: EvalOptions) -> list[Item]:
    """The same items on every process; where one of them cannot read its files, all are told."""
    try:
        items, problem = benchmark.limited(benchmark.items(data, options.split), options.limit), None
    except (EvaluationError, OSError) as error:
        items, problem = [], str(error)
    problems = [text for text in all_gather(problem) if text is not None]
    if problems:
        raise EvaluationError(problems[0])
    return items


def _model_config(options: EvalOptions) -> LlavaConfig:
    saved = read_config(options.checkpoint)
    if options.model is None:
        return with_pruning(saved, options.pruning)
    # How it is computed is the recipe's to say; a difference in what is computed is worth a word.
    same_way = dataclasses.replace(options.model, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
    if same_way != saved:
        logger.warning("config.model differs from %s/config.json and is used instead", options.checkpoint)
    return with_pruning(options.model, options.pruning)


def _plain(section: Any) -> Any:
    """A recipe's section without ml_collections' types."""
    return section.to_dict() if hasattr(section, "to_dict") else dict(section)


def fingerprint(directory: Path) -> str:
    """Tells checkpoints apart without reading their arrays: names and sizes of the files, contents of the small ones
    (Orbax names its data files anew at every save)."""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(p for p in (directory / "params").rglob("*") if p.is_file())]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        if size <= _SMALL_FILE:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main(flags: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> int:
    """Runs, writes the report and prints the scores; returns the exit status. Wrong input is one clear message on
    standard error."""
    logging.basicConfig(format="eval.py: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each restore
    try:
        options = options_of(flags, recipe)
        done = run(options)
        if jax.process_index() == 0:
            if options.report_items:
                _write_report(options, done)
            print(table(done.summary))
            print("\n".join(_throughput(summary) for summary in done.summaries.values()))
    except (EvaluationError, *LOADING_ERRORS, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    if done.failures:
        print(f"eval.py: not run, see above: {', '.join(done.failures)}", file=sys.stderr)
    return 1 if done.failures else 0


def _throughput(summary: Mapping[str, Any]) -> str:
    one = summary["throughput"]
    return f"{summary['title']}: {one['items']} items in {one['seconds']:.1f} s, {one['items_per_second']:.2f} items/s"


def _write_report(options: EvalOptions, done: Run) -> None:
    write_report(
        options.folder / REPORT,
        title=str(options.checkpoint),
        summary=done.summary,
        items=done.report_items,
        settings={
            "checkpoint": options.checkpoint,
            "profile": options.profile,
            "dtype": options.dtype or done.config.dtype,
            "pruning": done.config.pruning.name if done.config.pruning else "none",
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
        },
        paper_rows=rows_of(done.config),
    )
    print(f"report: {options.folder / REPORT}")
