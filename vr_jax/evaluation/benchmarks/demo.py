"""The held-out images of the demo, which are generated, so that nothing is downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import override

from vr_jax.data.demo.source import DemoSource
from vr_jax.errors import UserError
from vr_jax.evaluation.interface import Benchmark, Item, mean_by_category
from vr_jax.storage import Path


@dataclass(frozen=True)
class DemoHeldOut(Benchmark):
    """One question about each of a number of generated images, scored by exact match.

    Attributes:
        size: The number of images.
        seed: The seed of the images.
    """

    size: int = 600
    seed: int = 0

    name = "demo"
    title = "Demo"
    headline = "accuracy"

    @override
    def items(self, data: Path | None = None, split: str | None = None) -> list[Item]:
        chosen = "train" if split == "train" else "held_out"
        if split not in (None, chosen):
            raise UserError(f"the benchmark demo has no split {split!r}; it has 'held_out', the default, and 'train'")
        source = DemoSource(chosen, self.size, seed=self.seed)
        return [
            Item(sample.id, question.text, (question.answer,), question.kind, (sample.png,))
            for sample in map(source.sample, range(self.size))
            for question in sample.questions[:1]
        ]

    @override
    def prompt(self, item: Item) -> str:
        return item.question

    @override
    def score(self, prediction: str, item: Item) -> float:
        return float(prediction == item.answers[0])

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Returns the accuracy over all items and by category, and that of always giving the most frequent answer."""
        majority = Counter(item.answers[0] for item in items).most_common(1)[0][1]
        return {
            self.headline: sum(scores) / len(scores),
            "majority_baseline": majority / len(items),
            **mean_by_category(items, scores),
        }
