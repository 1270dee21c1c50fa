"""AI2D (Kembhavi et al. 2016; labels masked by letters) as lmms-eval scores it: exact match with the letter.

Data: `lmms-lab/ai2d`, split test, 3,088 rows of question, options (4), answer (index, as a text), image. Both profiles
score alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark, letter_of, lettered
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.tables import Column, integer, text, texts
from vr_jax.evaluation.types import Item, Published

_LETTER = re.compile(r"\s*([A-Z])\.")


class AI2D(PublishedBenchmark):
    name = "ai2d"
    title = "AI2D"
    headline = "exact_match"
    group = "Knowledge"
    published = Published("lmms-lab/ai2d", "test")
    columns = (Column("question", text), Column("options", texts), Column("answer", integer))

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return letter_of(record.get("answer"), record.get("options") or ())

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"options": tuple(record.get("options") or ())}

    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{lettered(item.fields['options'])}\n{LETTER_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        match = _LETTER.match(prediction)
        found = match[1] if match else prediction
        return float(any(exact_match(found.strip(), answer) for answer in item.answers))
