"""ChartQA (Masry et al. 2022) as lmms-eval scores it: relaxed accuracy.

Data: `lmms-lab/ChartQA`, split test, 2,500 rows of type ("human_test" or "augmented_test"), question, answer, image.
Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vr_jax.evaluation.tables import read_rows
from vr_jax.evaluation.types import Benchmark, EvaluationError, Item, Published, mean_by_category

COLUMNS = ("type", "question", "answer")
TOLERANCE = 0.05


@dataclass(frozen=True)
class ChartQA(Benchmark):
    name = "chartqa"
    title = "ChartQA"
    headline = "relaxed_overall"
    group = "OCR&Chart"
    published = Published("lmms-lab/ChartQA", "test")

    def items(self, data: Path | None, split: str | None = None) -> list[Item]:
        if data is None:
            raise EvaluationError(
                "chartqa needs --data: a folder with test.jsonl and pictures, or with the parquet files"
            )
        return [self.item(row.id, row.values, row.images, row.problem) for row in read_rows(data, split or self.published.split, COLUMNS)]

    def item(
        self,
        item_id: str,
        record: Mapping[str, Any],
        images: tuple[Path | bytes, ...] = (),
        problem: str | None = None,
    ) -> Item:
        kind, question, answer = (str(record.get(name, "")) for name in COLUMNS)
        return Item(item_id, question, (answer,), kind.split("_")[0], images, problem=problem)

    def prompt(self, item: Item) -> str:
        return f"{item.question}\nAnswer the question with a single word."

    def score(self, prediction: str, item: Item) -> float:
        return float(relaxed_match(prediction, item.answers[0]))

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
