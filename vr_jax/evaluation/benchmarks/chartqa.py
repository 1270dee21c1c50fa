"""ChartQA (Masry et al. 2022) as lmms-eval scores it: relaxed accuracy.

Data: `lmms-lab/ChartQA`, split test, 2,500 rows of type ("human_test" or "augmented_test"), question, answer, image.
Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark
from vr_jax.evaluation.tables import Column, text
from vr_jax.evaluation.types import Item, Published, mean_by_category

TOLERANCE = 0.05


class ChartQA(PublishedBenchmark):
    name = "chartqa"
    title = "ChartQA"
    headline = "relaxed_overall"
    group = "OCR&Chart"
    published = Published("lmms-lab/ChartQA", "test")
    columns = (Column("type", text), Column("question", text), Column("answer", text))

    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("type", "")).split("_")[0]

    def prompt(self, item: Item) -> str:
        return f"{item.question}\nAnswer the question with a single word."

    def score(self, prediction: str, item: Item) -> float:
        return float(any(relaxed_match(prediction, answer) for answer in item.answers))

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        splits = mean_by_category(items, scores)
        return {self.headline: sum(scores) / len(scores)} | {
            f"relaxed_{category}_split": mean for category, mean in splits.items()
        }


def relaxed_match(prediction: str, answer: str) -> bool:
    """Numbers may be off by five percent of a non-zero answer; everything else must be equal, ignoring case.

    Only a text that Python's `float` reads, or one that ends with %, is a number."""
    found, wanted = _number(prediction), _number(answer)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
