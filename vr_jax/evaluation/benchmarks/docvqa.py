"""DocVQA (Mathew et al. 2021), validation split, scored by ANLS.

The data are `lmms-lab/DocVQA`, configuration DocVQA, split validation, with 5,349 rows. A row has a question, its
answers, its question types, and an image. The answers of the test split (5,188 rows) are not published: its predictions
are written as the server of the Robust Reading Competition takes them. Prompts and scores are those of lmms-eval, and
both profiles give the same scores (docs/design/benchmarks.md#docvqa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark, as_texts, submitted_id
from vr_jax.evaluation.interface import Item, ItemResult, Published
from vr_jax.evaluation.metrics.anls import anls
from vr_jax.evaluation.tables import Column, answers, anything, text, texts


class DocVQA(PublishedBenchmark):
    """Questions about scanned documents. The category of an item is its first question type."""

    name = "docvqa"
    title = "DocVQA-val"
    headline = "anls"
    group = "OCR&Chart"
    published = Published("lmms-lab/DocVQA", "validation", "DocVQA")
    tokens = 32
    columns = (
        Column("question", text),
        Column("answers", answers),
        Column("question_types", texts, optional=True),
        Column("questionId", anything, optional=True),
    )

    @override
    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return as_texts(record.get("answers"))

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return next(iter(as_texts(record.get("question_types"))), "all")

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{SHORT_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        return anls(prediction, item.answers)

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"questionId": record.get("questionId")}

    @override
    def submission(self, items: Sequence[Item], results: Sequence[ItemResult]) -> Any:
        """Source: lmms-eval 0.7.3, `lmms_eval/tasks/docvqa/utils.py:docvqa_test_process_results`."""
        return [
            {"questionId": submitted_id(item.fields["questionId"], item), "answer": result.prediction or ""}
            for item, result in zip(items, results, strict=True)
        ]
