"""The items of an evaluation that its report shows, with their images and heat maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import numpy as np

from vr_jax.data.processor import Processor
from vr_jax.errors import UserError
from vr_jax.evaluation.attention_maps import maps_of_items
from vr_jax.evaluation.interface import Benchmark, Item, ItemResult
from vr_jax.evaluation.report import HeatMap, ReportItem
from vr_jax.evaluation.runner import Evaluation
from vr_jax.inference import Generator
from vr_jax.model.reread import reread_refusal

logger = logging.getLogger("vr_jax.evaluation")


def sample(total: int, count: int) -> Sequence[int]:
    """Returns `count` evenly spaced numbers out of 0 to `total` - 1, or all of them if there are not more."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist() if count else []


def report_items(
    evaluation: Evaluation, generator: Generator, processor: Processor, count: int, *, batch_size: int = 16
) -> list[ReportItem]:
    """Selects items for the report, and computes their heat maps if the model has local cross-attention.

    All processes of a run call it together, under the mesh of the evaluation.

    Args:
        evaluation: The finished evaluation.
        generator: The model that answered.
        processor: The processor of the model.
        count: The largest number of items.
        batch_size: The number of items in a batch, over all processes.
    """
    numbers = sample(len(evaluation.items), count)
    items = [evaluation.items[number] for number in numbers]
    maps: Sequence[tuple[HeatMap, ...]] = [()] * len(items)
    if items and reread_refusal(generator.model.config) is None:
        try:
            maps = maps_of_items(generator, processor, evaluation.benchmark, items, batch_size=batch_size)
        except (UserError, ValueError, jax.errors.JaxRuntimeError) as error:
            # The scores are complete by now. A failure of the heat maps, e.g. for lack of memory, must not lose them.
            logger.warning("%s: the report has no heat maps: %s", evaluation.benchmark.name, error)
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
    """Returns the question with its options and context, without the last line that says how to answer."""
    if item.problem is not None:
        return item.question
    text, _, last = benchmark.prompt(item).rpartition("\n")
    return text.rstrip() if text.strip() and last.startswith("Answer ") else f"{text}\n{last}".strip()
