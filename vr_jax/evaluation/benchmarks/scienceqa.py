"""ScienceQA (Lu et al. 2022), the questions that have an image, scored by the letter of the answer.

The data are `lmms-lab/ScienceQA`, configuration ScienceQA-IMG, split test, with 2,017 rows. A row has a question, 2 to
5 choices, the index of the answer, a hint, a subject, and an image. Prompts and scores are those of lmms-eval, and both
profiles give the same scores (docs/design/benchmarks.md#scienceqa).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark, letter_of, lettered
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.tables import Column, integer, text, texts


class ScienceQA(PublishedBenchmark):
    """Multiple-choice questions of school science. The categories are the subjects."""

    name = "scienceqa"
    title = "ScienceQA-IMG"
    headline = "exact_match"
    group = "Knowledge"
    published = Published("lmms-lab/ScienceQA", "test", "ScienceQA-IMG")
    columns = (
        Column("question", text),
        Column("choices", texts),
        Column("answer", integer),
        Column("hint", text, optional=True),
        Column("subject", text, optional=True),
    )

    @override
    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return letter_of(record.get("answer"), record.get("choices") or ())

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return record.get("subject") or "all"

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"choices": tuple(record.get("choices") or ()), "hint": record.get("hint") or ""}

    @override
    def prompt(self, item: Item) -> str:
        context = f"Context: {item.fields['hint']}\n" if item.fields["hint"] else ""
        return f"{context}{item.question}\n{lettered(item.fields['choices'])}\n{LETTER_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        prediction = prediction.strip()
        if len(prediction) > 1 and prediction[0].isupper() and prediction[1] == ".":
            prediction = prediction[0]
        return float(prediction.lower() in [answer.lower() for answer in item.answers])
