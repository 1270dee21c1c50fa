"""What a report shows of an evaluation: a sample of its items with their pictures and, for LLaVA-VR, heat maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vr_jax.data.processor import Processor
from vr_jax.evaluation.attention_maps import attention_maps
from vr_jax.evaluation.report import HeatMap, ReportItem
from vr_jax.evaluation.runner import Evaluation
from vr_jax.evaluation.types import Item, ItemResult
from vr_jax.inference.generate import Generator
from vr_jax.model.reread import reread_refusal


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
        maps = attention_maps(generator, processor, evaluation.benchmark, items, batch_size=batch_size)
    results = [evaluation.results[number] for number in numbers]
    return [
        _report_item(evaluation.benchmark.name, item, result, found)
        for item, result, found in zip(items, results, maps, strict=True)
    ]


def _report_item(benchmark: str, item: Item, result: ItemResult, maps: tuple[HeatMap, ...]) -> ReportItem:
    return ReportItem(
        id=item.id,
        category=item.category,
        question=item.question,
        references=item.answers,
        prediction=result.prediction,
        score=result.score,
        images=item.images,
        benchmark=benchmark,
        error=result.error,
        cut_off=result.finish == "length",
        maps=maps,
    )
