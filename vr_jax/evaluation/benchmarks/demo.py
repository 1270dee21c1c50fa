"""The demo's held-out pictures (generated, nothing to download): exact match, per kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vr_jax.data.demo.source import DemoSource
from vr_jax.evaluation.types import Item, Profile, mean_by_category


@dataclass(frozen=True)
class DemoHeldOut:
    """size: pictures, of each of which one question is asked. Needs no data."""

    profile: Profile = "default"
    size: int = 600
    seed: int = 0
    name: str = "demo"
    max_new_tokens: int = 16
    headline: str = "accuracy"

    def items(self, data: Path | None = None, split: str = "held_out") -> list[Item]:
        source = DemoSource("held_out", self.size, seed=self.seed)
        return [
            Item(sample.id, question.text, (question.answer,), question.kind, (sample.png,))
            for sample in map(source.sample, range(self.size))
            for question in sample.questions[:1]
        ]

    def prompt(self, item: Item) -> str:
        return item.question

    def clean(self, reply: str) -> str:
        return reply.strip()

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
