"""DocVQA (Mathew et al. 2021), validation, as lmms-eval scores it: ANLS.

Data: `lmms-lab/DocVQA`, configuration DocVQA, split validation, 5,349 rows of question, answers, question_types, image.
The answers of split test are not published. Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark, tuple_of
from vr_jax.evaluation.metrics.anls import anls
from vr_jax.evaluation.tables import Column, answers, text, texts
from vr_jax.evaluation.types import Item, Published


class DocVQA(PublishedBenchmark):
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
    )

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple_of(record.get("answers"))

    def category_of(self, record: Mapping[str, Any]) -> str:
        return next(iter(tuple_of(record.get("question_types"))), "all")

    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{SHORT_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        return anls(prediction, item.answers)
