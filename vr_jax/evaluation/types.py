"""Items on their way from a benchmark's files to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Profile = Literal["default", "v0.5"]  # lmms-eval 0.7.3, and 0.5.0 as in the paper's time
PROFILES: tuple[Profile, ...] = ("default", "v0.5")


class EvaluationError(ValueError):
    """An evaluation that cannot be run as asked; one line for the user."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. `problem` says why it cannot be asked; it then counts as answered wrongly."""

    id: str
    question: str  # as the data has it
    answers: tuple[str, ...]  # references
    category: str  # e.g. ChartQA's "human"
    images: tuple[Path | bytes, ...] = field(default=(), repr=False)  # encoded files
    fields: Mapping[str, Any] = field(default_factory=dict)  # further columns that the prompt or the metric needs
    problem: str | None = None


@dataclass(frozen=True)
class ItemResult:
    """One line of `items.jsonl`. `prediction` is the cleaned reply, None for an item that could not be asked, of which
    `error` says why."""

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    prediction: str | None
    score: float  # 0..1
    finish: Literal["stop", "length"] | None = None  # did the reply end, or was it cut off?
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ItemResult:
        """Raises TypeError for missing or unknown fields."""
        return cls(**{**values, "answers": tuple(values["answers"])})


class Benchmark(Protocol):
    """What the runner needs to know. An implementation is one file in `benchmarks/`, built for one profile."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> Profile: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def headline(self) -> str:
        """The metric of `aggregate` that tables show, times 100."""
        ...

    def items(self, data: Path | None, split: str) -> list[Item]:
        """All items in the order of the data. Raises EvaluationError where there is no data of the expected layout."""
        ...

    def prompt(self, item: Item) -> str:
        """What the user turn says, without or with image placeholders (without: they are put in front)."""
        ...

    def clean(self, reply: str) -> str:
        """The prediction in the model's reply."""
        ...

    def score(self, prediction: str, item: Item) -> float:
        """0..1."""
        ...

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Named metrics, 0..1, over all items."""
        ...


def mean_by_category(items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each category, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item.category, []).append(score)
    return {category: sum(members) / len(members) for category, members in groups.items()}
