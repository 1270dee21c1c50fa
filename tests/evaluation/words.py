"""A benchmark for tests: questions about noise, some of which cannot be asked."""

from __future__ import annotations

from dataclasses import dataclass

from tests.inference.tiny import png
from vr_jax.evaluation.interface import Benchmark, Item, mean_by_category


@dataclass(frozen=True)
class Words(Benchmark):
    name = "words"
    has_placeholders = True
    title = "Words"
    headline = "accuracy"
    max_new_tokens = 4

    def prompt(self, item):
        return item.question

    def score(self, prediction, item):
        return float(prediction in item.answers)

    def aggregate(self, items, scores):
        return {"accuracy": sum(scores) / len(scores), **mean_by_category(items, scores)}


GOOD = 9


def items() -> list[Item]:
    """Nine of two lengths, one of them without image; five that cannot be asked."""
    long = "Which colour is the tallest bar? abcdefghijkl"
    good = [
        Item(f"good-{i}", long if i % 3 == 0 else "What?", ("x",), "even" if i % 2 == 0 else "odd", (png(30, 15, i),))
        for i in range(GOOD - 1)
    ]
    good.append(Item("text-only", "What?", ("x",), "even"))
    bad = [
        Item("broken", "What?", ("x",), "odd", (png(30, 15)[:60],)),
        Item("no-image", "What?", ("x",), "odd", problem="missing_image: the row has no image"),
        Item("placeholders", "<image> <image>?", ("x",), "odd", (png(8, 8),)),
        Item("too-long", "x" * 500, ("x",), "odd", (png(8, 8),)),
        Item("half-a-character", "What is \ud83d?", ("x",), "odd", (png(8, 8),)),
    ]
    return [bad[0], *good[:4], bad[1], *good[4:], *bad[2:]]


BAD = {
    "broken": "broken_image",
    "no-image": "missing_image",
    "placeholders": "image_count",
    "too-long": "too_long",
    "half-a-character": "malformed_record",
}
