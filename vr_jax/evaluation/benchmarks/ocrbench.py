"""OCRBench (Liu et al. 2024) as lmms-eval scores it: the answer occurs in the reply.

Data: `echo840/OCRBench`, split test, 1,000 rows of dataset, question, question_type (10), answer (one or several),
image. The profiles differ for formulas (dataset HME100k) and full-width characters. The score is the number of right
answers out of 1,000, however many were asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vr_jax.evaluation.benchmarks.published import PublishedBenchmark
from vr_jax.evaluation.statistics import Estimates, Stratum, plain_estimates
from vr_jax.evaluation.tables import Column, answers, text
from vr_jax.evaluation.types import Item, Published

FULL_SIZE = 1000
_FORMULAS = "HME100k"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


class OCRBench(PublishedBenchmark):
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

    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("question_type", ""))

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"dataset": str(record.get("dataset", ""))}

    def prompt(self, item: Item) -> str:
        return item.question.strip()

    def score(self, prediction: str, item: Item) -> float:
        if self.profile == "v0.5":
            prediction = prediction.lower()
        fold = _without_spaces if item.fields["dataset"] == _FORMULAS else self._folded
        reply = fold(prediction.strip())
        return float(any(fold(answer) in reply for answer in item.answers))

    def _folded(self, text: str) -> str:
        if self.profile != "v0.5":
            text = text.translate(_FULL_WIDTH)
        return text.lower().strip().replace("\n", " ")

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        correct = int(sum(scores))
        return {self.headline: correct / FULL_SIZE, "correct": correct}

    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        share = Stratum(len(scores) / FULL_SIZE, 100 * np.asarray(scores, np.float64))
        return Estimates([share], plain_estimates([item.category for item in items], scores).categories)


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
