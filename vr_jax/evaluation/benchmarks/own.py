"""Questions of one's own: a file with questions, images and answers as a benchmark, by name and metric.

`vr_jax.evaluation.benchmarks.own_file` reads the file. The questions are asked as they stand there, as training shows
them to the model; only choices are written out behind their question. docs/evaluate.md#own-questions describes the
format and the metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, override

from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks.own_file import read_items
from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, lettered
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.evaluation.metrics.named import Metric, get_metric
from vr_jax.storage import Path, PathLike, as_path

DEFAULT_METRIC = "exact"
# A name is that of a folder, too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class OwnQuestions(Benchmark):
    """Questions of a file, scored by a metric that is chosen by name. The categories are those of the file.

    Attributes:
        name: The name, which is also that of the result folder.
        title: The name in tables.
        headline: The name of the metric.
        path: The file.
        images: The folder that image names are relative to. None is the folder of a JSON file; a parquet file then
            contains its images.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
        limit: The number of questions, from the first on. None is all of them.
    """

    name: str  # type: ignore[misc]  # Of this class, each instance has a name of its own.
    title: str  # type: ignore[misc]
    headline: str  # type: ignore[misc]
    path: Path
    images: Path | None = None
    follow_links: bool = False
    limit: int | None = None

    @property
    def metric(self) -> Metric:
        """The metric."""
        return get_metric(self.headline)

    @property
    @override
    def max_new_tokens(self) -> int:
        return 128

    @property
    @override
    def rules(self) -> dict[str, Any]:
        return {"metric": self.headline}

    @override
    def items(self, data: Path | None = None, split: str | None = None) -> list[Item]:
        """Reads the questions of the file.

        Raises:
            UserError: The file cannot be read, or one of its fields cannot be honoured; or `data` or `split` is given.
        """
        for field, value in {"data": data, "split": split}.items():
            if value is not None:
                raise UserError(f"{field} = {value}: {self.name} is the file {self.path}; leave {field} out")
        items = read_items(self.path, self.images, self.metric, follow_links=self.follow_links)
        return self.limited(items, self.limit)

    @override
    def prompt(self, item: Item) -> str:
        """Returns the question with its choices, or the text of the whole conversation that leads to it."""
        if len(item.turns) > 1:
            return "\n".join(f"{turn.role}: {turn.text}" for turn in item.turns)
        if item.turns:
            return item.turns[0].text
        choices = _choices(item)
        return f"{item.question}\n{lettered(choices)}\n{LETTER_ANSWER}" if choices else item.question

    @override
    def score(self, prediction: str, item: Item) -> float:
        return self.metric.score(prediction, item.answers, _choices(item))

    @override
    def unparsed(self, prediction: str, item: Item) -> bool:
        return self.metric.unparsed(prediction, _choices(item))


def _choices(item: Item) -> Sequence[str]:
    choices: Sequence[str] = item.fields.get("choices", ())
    return choices


def own_benchmark(
    name: str,
    path: PathLike,
    *,
    images: PathLike | None = None,
    metric: str = DEFAULT_METRIC,
    limit: int | None = None,
    follow_links: bool = False,
) -> OwnQuestions:
    """Makes a benchmark of a file of one's own. The file is read by `items`.

    Args:
        name: The name, which is also that of the result folder and the title in tables.
        path: A JSON Lines file of questions, or a JSON, JSON Lines or parquet file of conversations in LLaVA's format.
        images: The folder that image names are relative to. None is the folder of a JSON file; a parquet file then
            contains its images.
        metric: The name of the metric, one of `METRICS`.
        limit: The number of questions, from the first on. None is all of them.
        follow_links: Whether symbolic links inside the image folder may lead out of it.

    Raises:
        UserError: The name cannot be that of a folder, the metric is unknown, or a path lies in a bucket.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"benchmark {name!r}: expected a name of at most 64 letters, digits, dots, dashes and underscores that "
            "begins with a letter or a digit, because its results get a folder of this name"
        )
    get_metric(metric, f"benchmark {name}")
    if limit is not None and limit < 1:
        raise UserError(f"benchmark {name}: limit = {limit}: expected at least 1")
    return OwnQuestions(
        name=name,
        title=name,
        headline=metric,
        path=as_path(path, f"benchmark {name}"),
        images=None if images is None else as_path(images, "images"),
        follow_links=follow_links,
        limit=limit,
    )


def is_own(text: str) -> bool:
    """Returns whether a text names a file of one's own, NAME=FILE or NAME=FILE:METRIC, and not a benchmark by name."""
    return "=" in text


def named_own(text: str, reserved: Mapping[str, Any], **options: Any) -> OwnQuestions:
    """Makes a benchmark of the text NAME=FILE or NAME=FILE:METRIC.

    Args:
        text: The text. What follows its last colon is the metric.
        reserved: The names of other benchmarks, which NAME must not be.
        options: The further arguments of `own_benchmark`.

    Raises:
        UserError: The text is incomplete, the name is that of another benchmark, or `own_benchmark` refuses a part.
    """
    name, _, rest = (part.strip() for part in text.partition("="))
    path, colon, metric = (part.strip() for part in rest.rpartition(":"))
    if not colon:
        path, metric = metric, DEFAULT_METRIC
    if not name or not path or not metric:
        raise UserError(f"benchmark {text!r}: expected NAME=FILE or NAME=FILE:METRIC")
    if name.lower() in {known.lower() for known in reserved}:
        raise UserError(f"benchmark {text!r}: {name} is the name of another benchmark; choose another name")
    return own_benchmark(name, path, metric=metric, **options)
