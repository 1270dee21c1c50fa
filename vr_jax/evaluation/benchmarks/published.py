"""What the benchmarks with published data share: the way from rows to items, and their prompts' last lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vr_jax.evaluation import hub
from vr_jax.evaluation.files import Wanted
from vr_jax.evaluation.tables import Column, Row, read_rows
from vr_jax.evaluation.types import Benchmark, Item, Published

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


class PublishedBenchmark(Benchmark):
    """A benchmark whose rows are read from files. `item` makes an Item of a row's values, as the readers of `columns`
    leave them or as they are in the data, also of an incomplete row; subclasses say where its parts are (`..._of`)."""

    published: ClassVar[Published]
    columns: ClassVar[Sequence[Column]]
    files: ClassVar[tuple[str, ...]] = ()  # see `Wanted`
    several_folders: ClassVar[bool] = False
    tokens: ClassVar[int] = 16  # longest reply

    @property
    def max_new_tokens(self) -> int:
        return self.tokens

    def wanted(self, split: str | None = None) -> Wanted:
        published = self.published
        return Wanted(split or published.split, published.config, self.files, self.several_folders)

    def downloads(self, split: str | None = None) -> list[str]:
        """Patterns of the files that are fetched from the hub."""
        return self.wanted(split).patterns()

    def items(self, data: Path | None, split: str | None = None) -> list[Item]:
        """data: None fetches the published files from the Hugging Face hub."""
        if data is None:
            data = hub.download(
                self.name, self.published.repo, self.downloads(split), " or ".join(self.wanted(split).names())
            )
        return [self.item(row.id, row.values, row.images, row.problem) for row in self.rows(data, self.wanted(split))]

    def rows(self, data: Path, wanted: Wanted) -> list[Row]:
        return read_rows(data, wanted, self.columns)

    def item(
        self,
        item_id: str,
        record: Mapping[str, Any],
        images: tuple[Path | bytes, ...] = (),
        problem: str | None = None,
    ) -> Item:
        try:
            answers = self.answers_of(record)
        except ValueError as error:
            answers, problem = (), problem or f"malformed_record: answer: {error}"
        question, category = str(record.get("question", "")), self.category_of(record)
        return Item(item_id, question, answers, category, images, self.fields_of(record), problem)

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The references, none if the row lacks them. Raises ValueError for a row whose columns contradict each
        other."""
        return tuple_of(record.get("answer"))

    def category_of(self, record: Mapping[str, Any]) -> str:
        del record
        return "all"

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What else the prompt or the metric needs."""
        del record
        return {}


def lettered(options: Sequence[str]) -> str:
    """The options line by line: "A. ...", "B. ..."."""
    return "\n".join(f"{letter(number)}. {option}" for number, option in enumerate(options))


def letter(number: int) -> str:
    return chr(ord("A") + number)


def letter_of(number: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """The letter of the right choice, given its index; none if the row lacks it. Raises ValueError if there is no such
    choice."""
    if number is None:
        return ()
    if not 0 <= int(number) < len(choices):
        raise ValueError(f"expected an index of {len(choices)} choices, found {int(number)}")
    return (letter(int(number)),)


def tuple_of(value: Any) -> tuple[str, ...]:
    """The references in a record: one text or several, or none."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(map(str, value))
