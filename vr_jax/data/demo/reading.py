"""The generated pages as records: a caption of all that is highlighted, and questions about it.

A page of 12 x 12 patches has nine places, such as "top left". Each holds at most one highlighted patch. A question
names a place, and its answer is the one letter, digit or height that is highlighted there. A vision token that stands
for a window of 3 x 3 or 4 x 4 patches sees the highlighted patch of one place at most.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from random import Random
from typing import Any

from vr_jax.data.demo.export import llava_record, write_chartqa
from vr_jax.data.demo.images import Question
from vr_jax.data.demo.pages import BLOCK, KINDS, Mark, Page, draw_image
from vr_jax.data.demo.source import DemoSample, Split, encode_png
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.errors import UserError
from vr_jax.storage import Path, as_path, complete_directory, write_text

PAGE = Page(grid=12, patch=8)
# Rows and columns of patches in which nothing is highlighted. A window of 3 x 3 patches reaches over the border between
# two places there, and holds a highlighted patch of one of them at most.
NEVER = (3, 8)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
# The beginnings of the questions about a kind of page; the name of the place and `END` follow.
BEGINNINGS = {
    "word": "Which letter is highlighted at the ",
    "text": "Which letter is highlighted at the ",
    "table": "Which digit is highlighted at the ",
    "bars": "How high is the highlighted bar at the ",
    "line": "How high is the highlighted point at the ",
}
END = "?"
# The benchmark ChartQA ends every prompt with this sentence, so the questions of the training data end with it too.
SUFFIX = "\nAnswer the question with a single word."
NAMING, NEXT = ": ", ", "  # What stands in a caption between a place and its answer, and between two places.

CAPTIONS, QUESTIONS = "captions.json", "questions.json"
TRAIN, HELD_OUT = "train", "held_out"  # The folders of the two splits.


def place_of(mark: Mark) -> str:
    """The name of the place that a patch lies in."""
    return PLACES[mark.row // BLOCK * len(COLUMNS) + mark.column // BLOCK]


@dataclass(frozen=True)
class ReadingSample(DemoSample):
    """A page with questions and a caption.

    Attributes:
        caption: Every place with what is highlighted there.
        marks: The highlighted patches.
    """

    caption: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class ReadingSource:
    """A source of generated pages. Page `index` is a function of (split, seed, index) and of nothing else.

    The kinds of pages take turns. No content of a held-out page (its words, digits or heights) occurs in training.

    Attributes:
        split: The split.
        size: The number of pages.
        seed: The seed of all pages.
        turns: The number of questions about a page, as far as it has that many highlighted patches.
    """

    split: Split
    size: int
    seed: int = 0
    turns: int = 1

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: A setting has a value that it cannot have.
        """
        if self.split not in ("train", "held_out"):
            raise UserError(f"The generated pages have no split {self.split!r}; choose 'train' or 'held_out'.")
        if self.size < 0 or self.turns < 1:
            raise UserError(
                f"The generated pages cannot have size = {self.size} with turns = {self.turns}; expected size >= 0 "
                "and turns >= 1."
            )

    def __len__(self) -> int:
        """The number of pages."""
        return self.size

    def sample(self, index: int) -> ReadingSample:
        """Draws a page and chooses its questions.

        Raises:
            IndexError: There is no page with this index.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"page {index}: the {self.split} split has pages 0..{self.size - 1}")
        rng = Random(f"reading/{self.split}/{self.seed}/{index}")
        image = draw_image(KINDS[index % len(KINDS)], PAGE, self.split, rng, never=NEVER)
        marks = sorted(image.highlighted, key=lambda mark: PLACES.index(place_of(mark)))
        asked = rng.sample(marks, min(self.turns, len(marks)))
        questions = tuple(
            Question(image.kind, f"{BEGINNINGS[image.kind]}{place_of(mark)}{END}", mark.answer) for mark in asked
        )
        caption = NEXT.join(f"{place_of(mark)}{NAMING}{mark.answer}" for mark in marks)
        name = f"page-{self.split}-{self.seed}-{index}"
        return ReadingSample(name, image.kind, encode_png(image.pixels), questions, caption, tuple(marks))


def write_reading(directory: str | os.PathLike[str], *, pages: int, held_out: int, turns: int, seed: int = 0) -> Path:
    """Writes pages as files: those to train on in LLaVA's format, those to score in the format of ChartQA.

    Args:
        directory: The new folder. It will hold `train/captions.json`, `train/questions.json` and `train/images`, and
            `held_out/test.jsonl` with `held_out/images`. It appears when it is complete.
        pages: The number of pages to train on.
        held_out: The number of held-out pages, each with one question.
        turns: The number of questions about a page to train on.
        seed: The seed of the pages.

    Returns:
        The folder.

    Raises:
        UserError: The folder contains files already, or cannot be written.
    """
    with complete_directory(directory) as work:
        _write_train(ReadingSource("train", pages, seed, turns), work / TRAIN)
        write_chartqa(ReadingSource("held_out", held_out, seed), work / HELD_OUT)
    return as_path(directory)


def conversations(sample: ReadingSample) -> tuple[Conversation, Conversation]:
    """The caption of a page, and the questions about it with their answers, each as a training sample."""
    turns: list[Turn] = []
    for question in sample.questions:
        image = () if turns else (IMAGE, "\n")
        turns += [Turn("user", *image, question.text + SUFFIX), Turn("assistant", question.answer)]
    caption = (Turn("user", IMAGE), Turn("assistant", sample.caption))
    images = (sample.png,)
    return Conversation(id=sample.id, turns=caption, images=images), Conversation(sample.id, tuple(turns), images)


def _write_train(source: ReadingSource, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(len(source)):
        sample = source.sample(index)
        (folder / "images" / f"{sample.id}.png").write_bytes(sample.png)
        for records, conversation in zip((captions, questions), conversations(sample), strict=True):
            records.append(llava_record(conversation, f"images/{sample.id}.png"))
    write_text(folder / CAPTIONS, json.dumps(captions) + "\n")
    write_text(folder / QUESTIONS, json.dumps(questions) + "\n")
