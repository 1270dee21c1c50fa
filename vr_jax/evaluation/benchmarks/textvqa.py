"""TextVQA (Singh et al. 2019), validation, as lmms-eval scores it: VQA accuracy. OCR tokens are not shown.

Data: `lmms-lab/textvqa`, split validation, 5,000 rows of question, answers (10), image. Both profiles score alike. No
token limit there: 1024, as lmms-eval's model classes use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark, tuple_of
from vr_jax.evaluation.metrics.vqa import vqa_accuracy
from vr_jax.evaluation.tables import Column, answers, text
from vr_jax.evaluation.types import Item, Published


class TextVQA(PublishedBenchmark):
    name = "textvqa"
    title = "TextVQA-val"
    headline = "exact_match"
    group = "OCR&Chart"
    published = Published("lmms-lab/textvqa", "validation")
    tokens = 1024
    columns = (Column("question", text), Column("answers", answers))

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple_of(record.get("answers"))

    def prompt(self, item: Item) -> str:
        """`capitalize` also makes every other character lower-case, as in the reference."""
        return f"{item.question.capitalize()}\n{SHORT_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        return vqa_accuracy(prediction, item.answers)
