"""Evaluation of a checkpoint on one or several benchmarks, from its options to the overall summary and the report."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vr_jax.data.processor import Processor
from vr_jax.distributed import together
from vr_jax.errors import UserError
from vr_jax.evaluation import runner
from vr_jax.evaluation.benchmarks import PAPER, get_benchmark
from vr_jax.evaluation.data_folders import data_folder
from vr_jax.evaluation.interface import Benchmark, Item, ItemResult
from vr_jax.evaluation.overall import finished, overall_summary
from vr_jax.evaluation.paper_scores import rows_of
from vr_jax.evaluation.report import ReportItem, write_report
from vr_jax.evaluation.report_items import report_items
from vr_jax.evaluation.run_directory import SUMMARY
from vr_jax.inference import Generator, load_for_inference, with_pruning
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import read_config
from vr_jax.settings import TrainConfig
from vr_jax.sharding import make_mesh
from vr_jax.storage import check_unlocked, write_json

REPORT = "report.html"
_SMALL_FILE = 1 << 16  # bytes

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, and how. Raises UserError for a number that makes no sense."""

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
    model: VlmConfig | None = None  # default: the checkpoint's config.json
    mesh: Mapping[str, int] = field(default_factory=dict)  # arguments of `make_mesh`

    def __post_init__(self):
        for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 1), ("report_items", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{name} = {value!r}: expected an integer of at least {least}")
        names = self.names
        if self.split is not None and len(names) > 1:
            raise UserError(f"split = {self.split!r} with {len(names)} benchmarks: give it with one only")

    @property
    def names(self) -> tuple[str, ...]:
        """The benchmarks, in the order given. Raises UserError for none, or one that is given twice."""
        names = tuple(name.strip() for name in self.benchmark.split(",") if name.strip())
        if names == ("all",):
            return PAPER
        if not names:
            raise UserError("benchmark is empty: expected names, separated by commas, or all")
        if len(set(names)) < len(names):
            raise UserError(f"benchmark = {self.benchmark!r}: expected different names, separated by commas")
        return names

    @property
    def folder(self) -> Path:
        return self.output or self.checkpoint / "eval"


@dataclass(frozen=True)
class Run:
    """What `evaluate` leaves behind: the overall summary, the full summaries by benchmark, items for a report, what
    went wrong with benchmarks that could not be run, and the model's config as it was run."""

    summary: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    report_items: list[ReportItem]
    failures: dict[str, str]
    config: VlmConfig


def options_of(flags: Mapping[str, Any], config: TrainConfig | None) -> EvalOptions:
    """Flags that are set (not None) win over the config's `eval` section, which wins over the defaults; its `model`
    and `mesh` sections are taken as they are. Raises UserError for a missing checkpoint or benchmark."""
    section = {} if config is None else config.eval.to_dict()
    values = {name: value for name, value in section.items() if value is not None} | {
        name: value for name, value in flags.items() if value is not None
    }
    for name in ("checkpoint", "data", "output"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if config is not None:
        values |= {"model": config.model, "mesh": config.mesh.to_dict()}
    missing = sorted({"checkpoint", "benchmark"} - set(values))
    if missing:
        raise UserError("missing: " + ", ".join(f"--{name}" for name in missing))
    return EvalOptions(**values)


def evaluate(options: EvalOptions, on_batch: Callable[[Sequence[ItemResult]], None] | None = None) -> Run:
    """Answers and scores every benchmark, one after another; one that cannot be run does not keep the others from it.
    on_batch: see `runner.evaluate_items`.

    Raises UserError with a text for the user, also if no benchmark can be run."""
    benchmarks = [get_benchmark(name, options.profile) for name in options.names]
    alone = len(benchmarks) == 1
    config = together(lambda: _model_config(options))
    # What is wrong with output and data is told before the model is loaded, as far as it shows by then.
    together(lambda: _check_output(options, benchmarks))
    failures: dict[str, str] = {}
    ready: list[tuple[Benchmark, Path | None]] = []
    for one in benchmarks:
        with _noted(failures, one, alone):
            ready.append((one, together(partial(data_folder, one, options.data, several=not alone))))
    items = _items(*ready[0], options) if alone else None
    summaries: dict[str, dict[str, Any]] = {}
    shown: list[ReportItem] = []
    if ready:
        mesh = make_mesh(**options.mesh)
        loaded = load_for_inference(options.checkpoint, mesh, config=config, dtype=options.dtype)
        with jax.set_mesh(mesh):
            generator = Generator(loaded.model, loaded.tokenizer)
            for number, (one, folder) in enumerate(ready):
                with _noted(failures, one, alone):
                    share = (options.report_items - len(shown)) // (len(ready) - number)
                    found = items or _items(one, folder, options)
                    summaries[one.name], more = _evaluated(
                        one, found, generator, loaded.processor, options, share, on_batch
                    )
                    shown += more
                found = []  # its images need not stay while the next one's are read
    if not summaries:
        raise UserError("no benchmark could be run:\n" + "\n".join(f"  {text}" for text in failures.values()))
    others, left_out = finished(options.folder, like=next(iter(summaries.values())))
    summary = overall_summary(others | summaries, left_out)
    together(lambda: write_json(options.folder / SUMMARY, summary) if jax.process_index() == 0 else None)
    return Run(summary, summaries, shown, failures, config)


@contextmanager
def _noted(failures: dict[str, str], benchmark: Benchmark, alone: bool) -> Iterator[None]:
    """What goes wrong with one of several benchmarks is kept, and the others go on."""
    try:
        yield
    except UserError as error:
        if alone:
            raise
        logger.error("%s", error)
        failures[benchmark.name] = str(error)


def _check_output(options: EvalOptions, benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError for an output that is no folder, or to which another process is writing."""
    if jax.process_index() > 0:
        return
    folder = options.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); choose another --output") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: no permission to write there; choose another --output")
    for one in benchmarks:
        check_unlocked(folder / one.name)


def _evaluated(
    benchmark: Benchmark,
    items: list[Item],
    generator: Generator,
    processor: Processor,
    options: EvalOptions,
    share: int,
    on_batch: Callable[[Sequence[ItemResult]], None] | None,
) -> tuple[dict[str, Any], list[ReportItem]]:
    """The summary of one benchmark, and at most `share` of its items for the report."""
    evaluation = runner.evaluate_items(
        generator,
        processor,
        benchmark,
        items,
        options.folder / benchmark.name,
        settings={"checkpoint": {"path": str(options.checkpoint), "sha256": fingerprint(options.checkpoint)}},
        asked={name: getattr(options, name) for name in ("split", "limit", "max_new_tokens")},
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        overwrite=options.overwrite,
        on_batch=on_batch,
    )
    return evaluation.summary, report_items(evaluation, generator, processor, share, batch_size=options.batch_size)


def _items(benchmark: Benchmark, data: Path | None, options: EvalOptions) -> list[Item]:
    """The same items on every process; where one of them cannot read its files, all are told."""
    return together(lambda: benchmark.limited(benchmark.items(data, options.split), options.limit))


def _model_config(options: EvalOptions) -> VlmConfig:
    saved = read_config(options.checkpoint)
    if options.model is None:
        return with_pruning(saved, options.pruning)
    # How it is computed is the config's to say; a difference in what is computed is worth a word.
    same_way = dataclasses.replace(options.model, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
    if same_way != saved:
        logger.warning("config.model differs from %s/config.json and is used instead", options.checkpoint)
    return with_pruning(options.model, options.pruning)


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


def write_run_report(options: EvalOptions, done: Run) -> Path:
    """Writes `report.html` beside the results of a run and returns its path."""
    path = options.folder / REPORT
    write_report(
        path,
        title=str(options.checkpoint),
        summary=done.summary,
        items=done.report_items,
        settings={
            "checkpoint": options.checkpoint,
            "data": options.data or "Hugging Face hub",
            "profile": options.profile,
            **{name: getattr(options, name) for name in ("split", "limit") if getattr(options, name) is not None},
            "written": time.strftime("%Y-%m-%d %H:%M %Z"),
            "dtype": options.dtype or done.config.dtype,
            "pruning": done.config.pruning.name if done.config.pruning else "none",
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
        },
        paper_rows=rows_of(done.config),
    )
    return path
