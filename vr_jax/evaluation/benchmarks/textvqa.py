"""TextVQA (Singh et al. 2019), validation split, scored by VQA accuracy; the prompt holds no OCR tokens.

The data are `lmms-lab/textvqa`, split validation, with 5,000 rows. A row has a question, ten answers, and an image.
Prompts and scores are those of lmms-eval, and both profiles give the same scores (docs/design/benchmarks.md#textvqa).
The answers of the test split are not published: its predictions are written as the EvalAI server takes them.
lmms-eval sets no token limit; 1024 is what its model classes use then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark, as_texts, submitted_id
from vr_jax.evaluation.interface import Item, ItemResult, Published
from vr_jax.evaluation.metrics.vqa import vqa_accuracy
from vr_jax.evaluation.tables import Column, answers, anything, text


class TextVQA(PublishedBenchmark):
    """Questions about text in photographs."""

    name = "textvqa"
    title = "TextVQA-val"
    headline = "exact_match"
    group = "OCR&Chart"
    published = Published("lmms-lab/textvqa", "validation")
    tokens = 1024
    columns = (Column("question", text), Column("answers", answers), Column("question_id", anything, optional=True))

    @override
    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return as_texts(record.get("answers"))

    @override
    def prompt(self, item: Item) -> str:
        # As in lmms-eval, `capitalize` also makes all characters but the first lower-case.
        return f"{item.question.capitalize()}\n{SHORT_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        return vqa_accuracy(prediction, item.answers)

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"question_id": record.get("question_id")}

    @override
    def submission(self, items: Sequence[Item], results: Sequence[ItemResult]) -> Any:
        """Source: lmms-eval 0.7.3, `lmms_eval/tasks/textvqa/utils.py:textvqa_process_results`."""
        return [
            {"question_id": submitted_id(item.fields["question_id"], item), "answer": result.prediction or ""}
            for item, result in zip(items, results, strict=True)
        ]
