"""ScienceQA (Lu et al. 2022), questions with an image, as lmms-eval scores it: the letter, or "X." in front.

Data: `lmms-lab/ScienceQA`, configuration ScienceQA-IMG, split test, 2,017 rows of question, choices (2 to 5), answer
(index), hint, subject, image. Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark, letter_of, lettered
from vr_jax.evaluation.tables import Column, integer, text, texts
from vr_jax.evaluation.types import Item, Published


class ScienceQA(PublishedBenchmark):
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

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return letter_of(record.get("answer"), record.get("choices") or ())

    def category_of(self, record: Mapping[str, Any]) -> str:
        return record.get("subject") or "all"

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"choices": tuple(record.get("choices") or ()), "hint": record.get("hint") or ""}

    def prompt(self, item: Item) -> str:
        context = f"Context: {item.fields['hint']}\n" if item.fields["hint"] else ""
        return f"{context}{item.question}\n{lettered(item.fields['choices'])}\n{LETTER_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        prediction = prediction.strip()
        if len(prediction) > 1 and prediction[0].isupper() and prediction[1] == ".":
            prediction = prediction[0]
        return float(prediction.lower() in [answer.lower() for answer in item.answers])
