"""ChartQA (Masry et al. 2022), scored by relaxed accuracy.

The data are `lmms-lab/ChartQA`, split test, with 2,500 rows. A row has a type ("human_test" or "augmented_test"), a
question, an answer, and an image. Prompts and scores are those of lmms-eval, and both profiles give the same scores
(docs/design/benchmarks.md#chartqa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark
from vr_jax.evaluation.interface import Item, Published, mean_by_category
from vr_jax.evaluation.metrics.relaxed import relaxed_match
from vr_jax.evaluation.tables import Column, text


class ChartQA(PublishedBenchmark):
    """Questions about charts, written by people (category "human") or by a machine ("augmented")."""

    name = "chartqa"
    title = "ChartQA"
    headline = "relaxed_overall"
    group = "OCR&Chart"
    published = Published("lmms-lab/ChartQA", "test")
    columns = (Column("type", text), Column("question", text), Column("answer", text))

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("type", "")).split("_")[0]

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question}\nAnswer the question with a single word."

    @override
    def score(self, prediction: str, item: Item) -> float:
        return float(any(relaxed_match(prediction, answer) for answer in item.answers))

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        splits = mean_by_category(items, scores)
        return {self.headline: sum(scores) / len(scores)} | {
            f"relaxed_{category}_split": mean for category, mean in splits.items()
        }
