"""The base class of benchmarks with published data, and the parts of prompts that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from vr_jax.evaluation import hub
from vr_jax.evaluation.files import Wanted
from vr_jax.evaluation.interface import Benchmark, Item, Published
from vr_jax.evaluation.tables import Column, Row, read_rows
from vr_jax.storage import Path

# The last lines of prompts (docs/design/benchmarks.md#common-rules).
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


class PublishedBenchmark(Benchmark):
    """A benchmark whose rows are read from files.

    `item` builds an Item from the values of a row. The values are either what the readers of `columns` return or the
    raw cells of the data, and some may be absent. Subclasses override the methods `..._of` to say which values are the
    references, the category and the further fields.

    Attributes:
        columns: The columns that are read.
        files: Names of parquet files that do not follow the pattern `<split>-*.parquet`.
        several_folders: Whether the rows are spread over several folders.
        tokens: The largest number of tokens of a reply.
    """

    published: ClassVar[Published]
    columns: ClassVar[Sequence[Column]]
    files: ClassVar[tuple[str, ...]] = ()
    several_folders: ClassVar[bool] = False
    tokens: ClassVar[int] = 16

    @property
    def max_new_tokens(self) -> int:
        """The largest number of tokens of a reply."""
        return self.tokens

    def wanted(self, split: str | None = None) -> Wanted:
        """Describes the files of a split; None is the published split."""
        published = self.published
        return Wanted(split or published.split, published.config, self.files, self.several_folders)

    def downloads(self, split: str | None = None) -> list[str]:
        """Returns the patterns of the files that are downloaded from the Hugging Face hub."""
        return self.wanted(split).patterns()

    def items(self, data: Path | None, split: str | None = None) -> list[Item]:
        """Reads all items.

        Args:
            data: The folder of the benchmark's files, or one file. None downloads the published files from the hub.
            split: The split. None is the published one.

        Raises:
            UserError: There are no such files, or they cannot be read.
        """
        if data is None:
            data = hub.download(
                self.name, self.published.repo, self.downloads(split), " or ".join(self.wanted(split).names())
            )
        return [
            replace(self.item(row.id, row.values, row.images, row.problem), labelled=row.labelled)
            for row in self.rows(data, self.wanted(split))
        ]

    def rows(self, data: Path, wanted: Wanted) -> list[Row]:
        """Reads the rows of the files below `data`."""
        return read_rows(data, wanted, self.columns)

    def item(
        self,
        item_id: str,
        record: Mapping[str, Any],
        images: tuple[Path | bytes, ...] = (),
        problem: str | None = None,
    ) -> Item:
        """Builds an item from a row.

        Args:
            item_id: The id of the row.
            record: The values of the row by column.
            images: The encoded images, in the order of the prompt.
            problem: The reason why the item cannot be asked, if there is one.
        """
        try:
            answers = self.answers_of(record)
        except ValueError as error:
            answers, problem = (), problem or f"malformed_record: answer: {error}"
        question, category = str(record.get("question", "")), self.category_of(record)
        return Item(item_id, question, answers, category, images, self.fields_of(record), problem)

    def answers_of(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the references of a row, or none if the row lacks them.

        Raises:
            ValueError: The columns of the row contradict each other.
        """
        return as_texts(record.get("answer"))

    def category_of(self, record: Mapping[str, Any]) -> str:
        """Returns the category of a row, whose score the summary reports separately."""
        del record
        return "all"

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the further values that the prompt or the metric needs."""
        del record
        return {}


def lettered(options: Sequence[str]) -> str:
    """Writes each option on a line of its own: "A. ...", "B. ..."."""
    return "\n".join(f"{letter(number)}. {option}" for number, option in enumerate(options))


def letter(number: int) -> str:
    """Returns the letter of an option, counted from 0."""
    return chr(ord("A") + number)


def letter_of(number: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """Converts the index of the right choice to its letter.

    Args:
        number: The index, counted from 0, as a number or a text. None gives no letter.
        choices: The choices of the question.

    Raises:
        ValueError: There is no choice with this index.
    """
    if number is None:
        return ()
    if not 0 <= int(number) < len(choices):
        raise ValueError(f"expected an index of {len(choices)} choices, found {int(number)}")
    return (letter(int(number)),)


def as_texts(value: Any) -> tuple[str, ...]:
    """Converts the references of a row, which are one text, several texts or None, to a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(map(str, value))


def submitted_id(cell: Any, item: Item) -> Any:
    """Returns the id of a question for a server: the number or text of the data, or the item's id without one."""
    if isinstance(cell, str) and cell.isdecimal():
        return int(cell)
    return item.id if cell is None else cell
