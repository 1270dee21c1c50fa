"""Items on their way from a benchmark's files to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from vr_jax.errors import UserError
from vr_jax.evaluation.statistics import Estimates, plain_estimates

Profile = Literal["default", "v0.5"]  # lmms-eval 0.7.3, and 0.5.0 as in the paper's time
PROFILES: tuple[Profile, ...] = ("default", "v0.5")
Group = Literal["General", "Knowledge", "OCR&Chart"]  # of the paper's tables
GROUPS: tuple[Group, ...] = ("General", "Knowledge", "OCR&Chart")


class EvaluationError(UserError):
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
    """One line of `items.jsonl`. `prediction` is the cleaned reply, None for an item that could not be asked. `error`
    says why an item could not be asked or its reply not be scored; it then counts as wrong."""

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


@dataclass(frozen=True)
class Published:
    """Where a benchmark's parquet files are published: a Hugging Face dataset, its configuration, its split.

    The files are named `[<config>/]<split>-*.parquet`, somewhere below the dataset's folder."""

    repo: str  # e.g. "lmms-lab/ChartQA"
    split: str
    config: str | None = None  # None: the dataset has one only


@dataclass(frozen=True)
class Benchmark:
    """What the runner needs to know: where the items lie, the prompt, the reading of a reply, the metric, its
    aggregation. A benchmark is one file in `benchmarks/` with a subclass; the class variables have no default where
    none is given here."""

    profile: Profile = "default"

    name: ClassVar[str]  # of --benchmark and of the result folder
    title: ClassVar[str]  # in tables
    headline: ClassVar[str]  # the metric of `aggregate` that tables show
    group: ClassVar[Group | None] = None  # of the paper's tables
    published: ClassVar[Published | None] = None  # None: needs no data

    @property
    def max_new_tokens(self) -> int:
        return 16

    def items(self, data: Path | None, split: str | None = None) -> list[Item]:
        """All items in the order of the data. split: None for the published one. Raises EvaluationError where there is
        no data of the expected layout."""
        raise NotImplementedError

    def limited(self, items: Sequence[Item], limit: int | None) -> list[Item]:
        """The first `limit` items (None: all), and those that are only scored together with one of them."""
        return list(items[:limit])

    def prompt(self, item: Item) -> str:
        """What the user turn says, without or with image placeholders (without: they are put in front)."""
        raise NotImplementedError

    def clean(self, reply: str) -> str:
        """The prediction in the model's reply."""
        return reply.strip()

    def score(self, prediction: str, item: Item) -> float:
        """0..1."""
        raise NotImplementedError

    def unparsed(self, prediction: str, item: Item) -> bool:
        """Whether the metric finds no answer at all in a reply; it then counts as wrong, also where the reference
        guesses (MMMU). Counted in the summary."""
        del prediction, item
        return False

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Named metrics over all items, in the reference's own units."""
        return {self.headline: sum(scores) / len(scores)}

    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        """The score that tables show, 0..100, and that of each category, as what is resampled for their intervals."""
        return plain_estimates([item.category for item in items], scores)


def mean_by_category(items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each category, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item.category, []).append(score)
    return {category: sum(members) / len(members) for category, members in groups.items()}
