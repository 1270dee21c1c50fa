"""The demo's held-out images (generated, nothing to download): exact match, per kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vr_jax.data.demo.source import DemoSource
from vr_jax.evaluation.types import Benchmark, Item, mean_by_category


@dataclass(frozen=True)
class DemoHeldOut(Benchmark):
    """size: images, of each of which one question is asked. Needs no data."""

    size: int = 600
    seed: int = 0

    name = "demo"
    title = "Demo"
    headline = "accuracy"

    def items(self, data: Path | None = None, split: str | None = None) -> list[Item]:
        source = DemoSource("held_out", self.size, seed=self.seed)
        return [
            Item(sample.id, question.text, (question.answer,), question.kind, (sample.png,))
            for sample in map(source.sample, range(self.size))
            for question in sample.questions[:1]
        ]

    def prompt(self, item: Item) -> str:
        return item.question

    def score(self, prediction: str, item: Item) -> float:
        return float(prediction == item.answers[0])

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """`majority_baseline`: the accuracy of always giving the most frequent answer of these items."""
        majority = Counter(item.answers[0] for item in items).most_common(1)[0][1]
        return {
            self.headline: sum(scores) / len(scores),
            "majority_baseline": majority / len(items),
            **mean_by_category(items, scores),
        }
