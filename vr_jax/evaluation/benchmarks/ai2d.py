"""AI2D (Kembhavi et al. 2016), in the version whose diagrams have their labels replaced by letters.

The data are `lmms-lab/ai2d`, split test, with 3,088 rows. A row has a question, four options, the index of the answer
as a text, and an image. Prompts and scores are those of lmms-eval, and both profiles give the same scores
(docs/design/benchmarks.md#ai2d).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark, letter_of, lettered
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.tables import Column, integer, text, texts

_LETTER = re.compile(r"\s*([A-Z])\.")


class AI2D(PublishedBenchmark):
    """Multiple-choice questions about diagrams, scored by exact match with the letter of the right option."""

    name = "ai2d"
    title = "AI2D"
    headline = "exact_match"
    group = "Knowledge"
    published = Published("lmms-lab/ai2d", "test")
    columns = (Column("question", text), Column("options", texts), Column("answer", integer))

    @override
    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return letter_of(record.get("answer"), record.get("options") or ())

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"options": tuple(record.get("options") or ())}

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{lettered(item.fields['options'])}\n{LETTER_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        match = _LETTER.match(prediction)
        found = match[1] if match else prediction
        return float(any(exact_match(found.strip(), answer) for answer in item.answers))
