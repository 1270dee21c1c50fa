"""What a report shows of an evaluation: a sample of its items with their images and, for LLaVA-VR, heat maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import numpy as np

from vr_jax.data.processor import Processor
from vr_jax.evaluation.attention_maps import attention_maps
from vr_jax.evaluation.report import HeatMap, ReportItem
from vr_jax.evaluation.runner import Evaluation
from vr_jax.evaluation.types import Benchmark, EvaluationError, Item, ItemResult
from vr_jax.inference.generate import Generator
from vr_jax.model.reread import reread_refusal

logger = logging.getLogger("vr_jax.evaluation")


def sample(total: int, count: int) -> Sequence[int]:
    """`count` numbers out of 0..total-1, evenly spaced; all of them if there are not more."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist() if count else []


def report_items(
    evaluation: Evaluation, generator: Generator, processor: Processor, count: int, *, batch_size: int = 16
) -> list[ReportItem]:
    """At most `count` items for `report.write_report`. Run it as `evaluate` is run: all processes together."""
    numbers = sample(len(evaluation.items), count)
    items = [evaluation.items[number] for number in numbers]
    maps: Sequence[tuple[HeatMap, ...]] = [()] * len(items)
    if items and reread_refusal(generator.model.config) is None:
        try:
            maps = attention_maps(generator, processor, evaluation.benchmark, items, batch_size=batch_size)
        except (EvaluationError, ValueError, jax.errors.JaxRuntimeError) as error:  # the scores were what was asked for
            logger.warning("%s: no heat maps in the report: %s", evaluation.benchmark.name, error)
    results = [evaluation.results[number] for number in numbers]
    return [
        _report_item(evaluation.benchmark, item, result, found)
        for item, result, found in zip(items, results, maps, strict=True)
    ]


def _report_item(benchmark: Benchmark, item: Item, result: ItemResult, maps: tuple[HeatMap, ...]) -> ReportItem:
    return ReportItem(
        id=item.id,
        category=item.category,
        question=_asked(benchmark, item),
        references=item.answers,
        prediction=result.prediction,
        score=result.score,
        images=item.images,
        benchmark=benchmark.name,
        error=result.error,
        cut_off=result.finish == "length",
        maps=maps,
    )


def _asked(benchmark: Benchmark, item: Item) -> str:
    """The question with its options and context, without the line that says how to answer."""
    if item.problem is not None:
        return item.question
    text, _, last = benchmark.prompt(item).rpartition("\n")
    return text.rstrip() if last.startswith("Answer ") else f"{text}\n{last}".strip()
