"""The interface between benchmarks and the runner: items, their results, and the base class of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from vr_jax.data.types import Turn
from vr_jax.evaluation.bootstrap import Estimates, plain_estimates
from vr_jax.storage import Path

# A profile names the version of lmms-eval whose scoring rules apply: 0.7.3 by default, or 0.5.0, which was current when
# the paper was written (docs/design/benchmarks.md#versions).
Profile = Literal["default", "v0.5"]
PROFILES: tuple[Profile, ...] = ("default", "v0.5")
# The groups of benchmarks in the paper's tables.
Group = Literal["General", "Knowledge", "OCR&Chart"]
GROUPS: tuple[Group, ...] = ("General", "Knowledge", "OCR&Chart")


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: The id, unique within the benchmark.
        question: The question as the data has it.
        answers: The reference answers.
        category: The category whose score the summary reports separately, e.g. "human" in ChartQA.
        images: The encoded images, or the paths of their files, in the order of the prompt.
        fields: Further values of the data that the prompt or the metric needs.
        problem: The reason why the item cannot be asked, as "<reason>: <detail>", or None. Such an item counts as
            wrong.
        labelled: Whether the data have reference answers. Those of a test split often have none, and its items are
            answered but not scored.
        turns: The whole conversation that asks the question, the user's turn last, where the data have one. Without it
            the benchmark's prompt is the only turn.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    category: str
    images: tuple[Path | bytes, ...] = field(default=(), repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    labelled: bool = True
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class ItemResult:
    """The answer to an item and its score, which is one line of `items.jsonl`.

    Attributes:
        id: The id of the item.
        category: The category of the item.
        question: The question as the data has it.
        answers: The reference answers.
        prediction: The cleaned reply of the model, or None if the item could not be asked.
        score: The score, from 0 to 1.
        finish: Whether the reply ended by itself ("stop") or at the token limit ("length").
        error: The reason why the item could not be asked or its reply could not be scored. The score is then 0.
    """

    id: str
    category: str
    question: str
    answers: tuple[str, ...]
    prediction: str | None
    score: float
    finish: Literal["stop", "length"] | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that JSON can hold."""
        return asdict(self) | {"answers": list(self.answers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ItemResult:
        """Builds a result from what `to_dict` returns.

        Raises:
            TypeError: A field is missing or unknown.
        """
        return cls(**{**values, "answers": tuple(values["answers"])})


@dataclass(frozen=True)
class Published:
    """The Hugging Face dataset that holds a benchmark.

    Its parquet files are named `[<config>/]<split>-*.parquet` and lie somewhere below the dataset's folder.

    Attributes:
        repo: The repository, e.g. "lmms-lab/ChartQA".
        split: The split.
        config: The configuration, or None if the dataset has only one.
    """

    repo: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set of questions, the prompts that ask them, and the metric that scores the replies.

    A benchmark is a subclass in a module of `vr_jax/evaluation/benchmarks/`. It sets the class variables that have no
    default here.

    Attributes:
        profile: The scoring profile.
        name: The name on the command line, which is also the name of the result folder.
        title: The name in tables.
        headline: The metric of `aggregate` that tables show.
        group: The group of the paper's tables that the benchmark belongs to, or None.
        published: The published data, or None if the benchmark needs no data.
        has_placeholders: Whether prompts may say with `<image>` where an image belongs. Otherwise a prompt is text, and
            the images stand in front of it.
    """

    profile: Profile = "default"

    name: ClassVar[str]
    title: ClassVar[str]
    headline: ClassVar[str]
    group: ClassVar[Group | None] = None
    published: ClassVar[Published | None] = None
    has_placeholders: ClassVar[bool] = False

    @property
    def max_new_tokens(self) -> int:
        """The largest number of tokens of a reply."""
        return 16

    @property
    def rules(self) -> dict[str, Any]:
        """Further choices that decide the scores, as values that JSON can hold. Results under others are not mixed."""
        return {}

    def items(self, data: Path | None, split: str | None = None) -> list[Item]:
        """Reads all items in the order of the data.

        Args:
            data: The folder of the benchmark's files. None downloads the published files.
            split: The split. None is the published one.

        Raises:
            UserError: There are no files of the expected layout.
        """
        raise NotImplementedError

    def limited(self, items: Sequence[Item], limit: int | None) -> list[Item]:
        """Returns the first `limit` items, and the items that are only scored together with one of these.

        Args:
            items: All items.
            limit: The number of items. None returns all.
        """
        return list(items[:limit])

    def prompt(self, item: Item) -> str:
        """Returns the text of the user turn; for an item with `turns`, the text of all of them.

        If the text has no image placeholders, they are put in front of it.
        """
        raise NotImplementedError

    def clean(self, reply: str) -> str:
        """Extracts the prediction from the reply of the model."""
        return reply.strip()

    def score(self, prediction: str, item: Item) -> float:
        """Scores a prediction from 0 to 1."""
        raise NotImplementedError

    def unparsed(self, prediction: str, item: Item) -> bool:
        """Says whether the metric finds no answer at all in a prediction.

        Such a prediction counts as wrong, also where lmms-eval guesses (MMMU). The summary counts these predictions.
        """
        del prediction, item
        return False

    def submission(self, items: Sequence[Item], results: Sequence[ItemResult]) -> Any:
        """Returns the predictions of a split without reference answers, as the benchmark's server takes them.

        Args:
            items: The items.
            results: Their results, in the same order.

        Returns:
            A value that JSON can hold; by default a list of {"id", "answer"}.
        """
        return [{"id": item.id, "answer": one.prediction or ""} for item, one in zip(items, results, strict=True)]

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Computes the named metrics over all items, in the units of lmms-eval."""
        return {self.headline: sum(scores) / len(scores)}

    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        """Returns the scores that tables show, from 0 to 100, as the strata that are resampled for their intervals."""
        return plain_estimates([item.category for item in items], scores)


def mean_by_category(items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
    """Returns the mean score of each category, in the order of their first items."""
    groups: dict[str, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item.category, []).append(score)
    return {category: sum(members) / len(members) for category, members in groups.items()}
