"""OCRBench (Liu et al. 2024): a reply is right if it contains the answer.

The data are `echo840/OCRBench`, split test, with 1,000 rows. A row has the name of its source dataset, a question, one
of 10 question types, one or several answers, and an image. Prompts and scores are those of lmms-eval; the two profiles
differ for formulas (dataset HME100k) and for full-width characters (docs/design/benchmarks.md#ocrbench). The score is
the number of right answers out of 1,000, even if fewer questions were asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, override

import numpy as np

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark
from vr_jax.evaluation.bootstrap import Estimates, Stratum, plain_estimates
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.metrics.contains import folded
from vr_jax.evaluation.tables import Column, answers, text

FULL_SIZE = 1000
_FORMULAS = "HME100k"


class OCRBench(PublishedBenchmark):
    """Questions about text in images. The categories are the question types."""

    name = "ocrbench"
    title = "OCRBench"
    headline = "ocrbench_accuracy"
    group = "OCR&Chart"
    published = Published("echo840/OCRBench", "test")
    tokens = 128
    columns = (
        Column("dataset", text),
        Column("question", text),
        Column("question_type", text),
        Column("answer", answers),
    )

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("question_type", ""))

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"dataset": str(record.get("dataset", ""))}

    @override
    def prompt(self, item: Item) -> str:
        return item.question.strip()

    @override
    def score(self, prediction: str, item: Item) -> float:
        if self.profile == "v0.5":
            prediction = prediction.lower()
        fold = _without_spaces if item.fields["dataset"] == _FORMULAS else self._folded
        reply = fold(prediction.strip())
        return float(any(fold(answer) in reply for answer in item.answers))

    def _folded(self, text: str) -> str:
        return text.lower().strip().replace("\n", " ") if self.profile == "v0.5" else folded(text)

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        correct = int(sum(scores))
        return {self.headline: correct / FULL_SIZE, "correct": correct}

    @override
    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        share = Stratum(len(scores) / FULL_SIZE, 100 * np.asarray(scores, np.float64))
        return Estimates([share], plain_estimates([item.category for item in items], scores).categories)


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
