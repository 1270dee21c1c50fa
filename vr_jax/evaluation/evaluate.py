"""The evaluation of a checkpoint on one or several benchmarks, up to the overall summary and the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from vr_jax.data.processor import Processor
from vr_jax.distributed import is_first, together
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks.own import OwnQuestions
from vr_jax.evaluation.chosen import REPORT, chosen_benchmarks
from vr_jax.evaluation.data_folders import data_folder
from vr_jax.evaluation.interface import Benchmark, Item, ItemResult
from vr_jax.evaluation.overall import finished, overall_summary
from vr_jax.evaluation.paper_scores import rows_of
from vr_jax.evaluation.report import ReportItem, write_report
from vr_jax.evaluation.report_items import report_items
from vr_jax.evaluation.run_directory import SUBMISSION, SUMMARY
from vr_jax.evaluation.runner import evaluate_items, is_labelled
from vr_jax.hub import is_hub_name, local_folder
from vr_jax.inference import Generator, load_for_inference, with_penalty, with_pruning
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import read_config
from vr_jax.settings import EvaluationSettings, MeshSettings
from vr_jax.sharding import make_mesh
from vr_jax.storage import Path, as_path, check_unlocked, is_local, make_folder, write_json

# The fields of the settings that choose the items. Scores over different items are not combined.
_ASKED = ("split", "limit", "max_new_tokens")
_SMALL_FILE = 1 << 16  # The largest file, in bytes, whose content enters the fingerprint of a checkpoint.

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True)
class Outcome:
    """The outcome of `evaluate`.

    Attributes:
        settings: The settings of the evaluation.
        summary: The overall summary, which `summary.json` in the output folder holds. It contains the benchmarks of
            this evaluation and those that earlier ones left in the folder.
        summaries: The full summaries of the benchmarks of this evaluation, by name.
        report_items: The items that the report shows.
        failures: The reasons why benchmarks could not be run, by name.
        predictions: The files with the predictions of benchmarks whose data have no reference answers, by name. These
            benchmarks have no score, and are not part of `summary` and `summaries`.
        config: The config of the model that answered.
    """

    settings: EvaluationSettings
    summary: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    report_items: list[ReportItem]
    failures: dict[str, str]
    predictions: dict[str, Path]
    config: VlmConfig


def evaluate(
    settings: EvaluationSettings,
    *,
    model: VlmConfig | None = None,
    mesh: MeshSettings | None = None,
    on_batch: Callable[[Sequence[ItemResult]], None] | None = None,
) -> Outcome:
    """Evaluates a checkpoint on benchmarks, one after another.

    The results are written to the output folder after every batch, so that an interrupted evaluation continues when it
    is repeated. If one of several benchmarks cannot be run, the others still are. All processes of a run call the
    function together.

    Args:
        settings: The checkpoint, the benchmarks and how they are run. `checkpoint` and `benchmark` must be set.
        model: A config of the model that replaces the checkpoint's, e.g. to compute in another dtype.
        mesh: The device mesh. By default the parameters are sharded over all devices.
        on_batch: A function that the first process calls with the results of each batch.

    Returns:
        The scores, and the items for a report; see `write_run_report`.

    Raises:
        UserError: The settings are incomplete, the checkpoint cannot be loaded, the output folder cannot be used, or no
            benchmark can be run.
    """
    missing = [name for name in ("checkpoint", "benchmark") if not getattr(settings, name)]
    if missing:
        raise UserError("missing: " + ", ".join(f"--{name}" for name in missing))
    benchmarks = chosen_benchmarks(settings)
    alone = len(benchmarks) == 1
    several = sum(not isinstance(one, OwnQuestions) for one in benchmarks) > 1
    output = output_folder(settings)
    checkpoint = together(lambda: checkpoint_folder(settings))
    data = None if settings.data is None else together(lambda: local_folder(settings.data or "", "dataset"))
    config = together(lambda: _model_config(settings, model))
    # Problems with the output folder and the data are reported before the model is loaded, which can take minutes.
    together(lambda: _check_output(output, benchmarks, settings.overwrite))
    failures: dict[str, str] = {}
    ready: list[tuple[Benchmark, Path | None]] = []
    early: dict[str, list[Item]] = {}
    for one in benchmarks:
        with _noted(failures, one, alone):
            own = isinstance(one, OwnQuestions)
            folder = None if own else together(partial(data_folder, one, data, several=several))
            if alone or own:
                early[one.name] = _items(one, folder, settings)
            ready.append((one, folder))
    summaries: dict[str, dict[str, Any]] = {}
    predictions: dict[str, Path] = {}
    shown: list[ReportItem] = []
    if ready:
        device_mesh = make_mesh(**(mesh or MeshSettings()).to_dict())
        loaded = load_for_inference(
            checkpoint, device_mesh, config=config, dtype=settings.dtype, weights=settings.weights
        )
        with jax.set_mesh(device_mesh):
            generation = with_penalty(loaded.generation, settings.repetition_penalty)
            generator = Generator(loaded.model, loaded.tokenizer, settings=generation)
            for number, (one, folder) in enumerate(ready):
                with _noted(failures, one, alone):
                    share = (settings.report_items - len(shown)) // (len(ready) - number)
                    found = early.pop(one.name, None) or _items(one, folder, settings)
                    done, more = _evaluated(one, found, generator, loaded.processor, settings, share, on_batch)
                    if done["score"] is None:
                        predictions[one.name] = output / one.name / SUBMISSION
                    else:
                        summaries[one.name] = done
                    shown += more
                found = []  # The images of one benchmark are released before those of the next one are read.
    if not summaries and not predictions:
        raise UserError("no benchmark could be run: " + "; ".join(failures.values()))
    others, left_out = finished(output, like=next(iter(summaries.values()))) if summaries else ({}, {})
    summary = overall_summary(others | summaries, left_out)
    together(lambda: write_json(output / SUMMARY, summary) if is_first() and summaries else None)
    return Outcome(settings, summary, summaries, shown, failures, predictions, config)


def checkpoint_folder(settings: EvaluationSettings) -> Path:
    """Returns the model directory of an evaluation. One that lies on the Hugging Face hub is downloaded first.

    Raises:
        UserError: It cannot be downloaded.
    """
    return local_folder(settings.checkpoint or "")


def output_folder(settings: EvaluationSettings) -> Path:
    """Returns the folder of the results, in which each benchmark has a folder.

    Raises:
        UserError: No folder is set, and the checkpoint lies on the Hugging Face hub.
    """
    if settings.output:
        return as_path(settings.output, "output")
    if is_hub_name(settings.checkpoint or ""):
        raise UserError(
            f"{settings.checkpoint} is fetched from the Hugging Face hub: set --output to a folder for results"
        )
    return checkpoint_folder(settings) / "eval"


@contextmanager
def _noted(failures: dict[str, str], benchmark: Benchmark, alone: bool) -> Iterator[None]:
    """Records the failure of one of several benchmarks, so that the others can go on."""
    try:
        yield
    except UserError as error:
        if alone:
            raise
        logger.error("%s", error)
        failures[benchmark.name] = str(error)


def _check_output(output: Path, benchmarks: Sequence[Benchmark], overwrite: bool) -> None:
    """Raises UserError if the first process cannot write to the output folder, or it is somebody else's."""
    if not is_first():
        return
    make_folder(output)
    if is_local(output) and not os.access(output, os.W_OK):
        raise UserError(f"{output}: no permission to write there; choose another --output")
    for one in benchmarks:
        check_unlocked(output / one.name)
    if not overwrite and (foreign := _foreign(output)):
        raise UserError(
            f"{output} holds a {foreign} that no evaluation has written; choose another --output, or move it"
        )


def _foreign(output: Path) -> str | None:
    """The name of a file that the evaluation would replace and that somebody else has written, or None."""
    path = output / SUMMARY
    if not path.exists():
        return REPORT if (output / REPORT).exists() else None  # the report is written after the summary
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return SUMMARY
    return None if isinstance(found, dict) and "benchmarks" in found else SUMMARY


def _evaluated(
    benchmark: Benchmark,
    items: list[Item],
    generator: Generator,
    processor: Processor,
    settings: EvaluationSettings,
    share: int,
    on_batch: Callable[[Sequence[ItemResult]], None] | None,
) -> tuple[dict[str, Any], list[ReportItem]]:
    """Returns the summary of one benchmark, and at most `share` of its items for the report."""
    checkpoint = checkpoint_folder(settings)
    evaluation = evaluate_items(
        generator,
        processor,
        benchmark,
        items,
        output_folder(settings) / benchmark.name,
        settings={"checkpoint": {"path": str(checkpoint), "sha256": fingerprint(checkpoint)}}
        | ({"weights": settings.weights} if settings.weights else {}),
        asked={name: getattr(settings, name) for name in _ASKED},
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        overwrite=settings.overwrite,
        on_batch=on_batch,
    )
    if not is_labelled(items):
        return evaluation.summary, []
    return evaluation.summary, report_items(evaluation, generator, processor, share, batch_size=settings.batch_size)


def _items(benchmark: Benchmark, data: Path | None, settings: EvaluationSettings) -> list[Item]:
    """Reads the same items on every process. If one process cannot read its files, all of them raise the error."""
    return together(lambda: benchmark.limited(benchmark.items(data, settings.split), settings.limit))


def _model_config(settings: EvaluationSettings, model: VlmConfig | None) -> VlmConfig:
    checkpoint = checkpoint_folder(settings)
    saved = read_config(checkpoint)
    if model is None:
        return with_pruning(saved, settings.pruning)
    # A config may choose freely how the model is computed. If it changes what is computed, the user should know.
    same_way = dataclasses.replace(model, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
    if same_way != saved:
        logger.warning("config.model differs from %s/config.json, and config.model is used", checkpoint)
    return with_pruning(model, settings.pruning)


def fingerprint(directory: Path) -> str:
    """Computes a digest that tells checkpoints apart without reading their arrays.

    The digest covers the names and sizes of all files, and the content of the small ones. That is enough, because Orbax
    gives its data files new names at every save.
    """
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(p for p in (directory / "params").rglob("*") if p.is_file())]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        if size <= _SMALL_FILE:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_run_report(outcome: Outcome) -> Path:
    """Writes `report.html` to the output folder of an evaluation and returns its path."""
    settings, config = outcome.settings, outcome.config
    chosen = {name: getattr(settings, name) for name in ("split", "limit")}
    shown: Mapping[str, object] = {
        "checkpoint": settings.checkpoint,
        **_data_shown(settings),
        **{name: value for name, value in chosen.items() if value is not None},
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "dtype": settings.dtype or config.dtype,
        **({"weights": settings.weights} if settings.weights else {}),
        "pruning": config.pruning.name if config.pruning else "none",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    path = output_folder(settings) / REPORT
    write_report(
        path,
        title=str(settings.checkpoint),
        summary=outcome.summary,
        items=outcome.report_items,
        settings=shown,
        paper_rows=rows_of(config),
    )
    return path


def _data_shown(settings: EvaluationSettings) -> dict[str, str]:
    """The lines of the report that say where the questions come from and by which rules they are scored."""
    benchmarks = chosen_benchmarks(settings)
    own = [one for one in benchmarks if isinstance(one, OwnQuestions)]
    published = {"data": settings.data or "Hugging Face hub", "profile": settings.profile}
    return (published if len(own) < len(benchmarks) else {}) | {
        one.name: f"{one.path}, metric {one.headline}: {one.metric.rule}" for one in own
    }
