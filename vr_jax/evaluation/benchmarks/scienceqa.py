"""ScienceQA (Lu et al. 2022), questions with a picture, as lmms-eval scores it: the letter, or "X." in front.

Data: `lmms-lab/ScienceQA`, configuration ScienceQA-IMG, split test, 2,017 rows of question, choices (2 to 5), answer
(index), hint, subject, image. Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark, letter, lettered
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

    def item(
        self,
        item_id: str,
        record: Mapping[str, Any],
        images: tuple[Path | bytes, ...] = (),
        problem: str | None = None,
    ) -> Item:
        choices, answer = record.get("choices") or (), record.get("answer")
        answers, problem = letter_of(answer, choices, problem)
        fields = {"choices": tuple(choices), "hint": record.get("hint") or ""}
        category = record.get("subject") or "all"
        return Item(item_id, str(record.get("question", "")), answers, category, images, fields, problem)

    def prompt(self, item: Item) -> str:
        context = f"Context: {item.fields['hint']}\n" if item.fields["hint"] else ""
        return f"{context}{item.question}\n{lettered(item.fields['choices'])}\n{LETTER_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        prediction = prediction.strip()
        if len(prediction) > 1 and prediction[0].isupper() and prediction[1] == ".":
            prediction = prediction[0]
        return float(prediction.lower() in [answer.lower() for answer in item.answers])


def letter_of(answer: Any, choices: Any, problem: str | None) -> tuple[tuple[str, ...], str | None]:
    """The letter of the right choice, given its index, and what is wrong with a row."""
    if answer is None:
        return (), problem
    number = int(answer)
    if not 0 <= number < len(choices):
        return (), problem or f"malformed_record: answer: expected an index of {len(choices)} choices, found {number}"
    return (letter(number),), problem
