"""The generated data set of the demo: record `index` is a function of (split, seed, index) and nothing else."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data.demo.images import SUBJECTS, Content, Question, Subject
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.errors import UserError

Split = Literal["train", "held_out"]
# One content in this number of contents belongs to the held-out split.
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class DemoSample:
    """One generated image and the questions about it.

    Attributes:
        id: The name of the sample.
        subject: The name of the image's subject.
        png: The encoded image.
        questions: The questions in the order in which they are asked.
    """

    id: str
    subject: str
    png: bytes
    questions: tuple[Question, ...]

    def conversation(self) -> Conversation:
        """Returns the questions and answers as the turns of a conversation."""
        turns = []
        for number, question in enumerate(self.questions):
            image = (IMAGE, "\n") if number == 0 else ()
            turns += [Turn("user", *image, question.text), Turn("assistant", question.answer)]
        return Conversation(id=self.id, turns=tuple(turns), images=(self.png,))


class DemoSource:
    """A source of generated conversations about one image each. Nothing is stored, and it can be pickled.

    The splits are disjoint by construction, whatever the seeds: a content belongs to the held-out split if and only if
    its CRC-32 is divisible by `HELD_OUT_SHARE`, and each record draws contents until one belongs to its own split. So
    no held-out chart (its colours and values in order), table (its digits) or word (with its colour and position) is in
    the training split.

    The subjects alternate, so that each has the same share. The questions about an image are in random order. The first
    one is drawn by kind, so that no kind of a subject is rarer than another.

    Attributes:
        split: The split.
        size: The number of records.
        seed: The seed of all records.
        turns: The number of questions about an image, as far as it has that many.
    """

    def __init__(self, split: str, size: int, seed: int = 0, *, turns: int = 1):
        """Checks the settings.

        Args:
            split: "train" or "held_out".
            size: The number of records, at least 0.
            seed: The seed of all records.
            turns: The number of questions about an image, at least 1.

        Raises:
            UserError: A setting has a value that it cannot have.
        """
        if split not in ("train", "held_out"):
            raise UserError(f"The demo data has no split {split!r}; choose 'train' or 'held_out'.")
        if size < 0 or turns < 1:
            raise UserError(
                f"The demo data cannot have size = {size} with turns = {turns}; expected size >= 0 and turns >= 1."
            )
        self.split = split
        self.size = size
        self.seed = seed
        self.turns = turns

    def __len__(self) -> int:
        """Returns the number of records."""
        return self.size

    def __repr__(self) -> str:
        """Shows all settings."""
        return f"DemoSource({self.split!r}, {self.size}, seed={self.seed}, turns={self.turns})"

    def __getitem__(self, index: int) -> Conversation:
        """Generates a record.

        Raises:
            IndexError: There is no record with this index.
        """
        return self.sample(index).conversation()

    def sample(self, index: int) -> DemoSample:
        """Generates a record together with the kinds and answers of its questions.

        Raises:
            IndexError: There is no record with this index.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"demo record {index}: the {self.split} split has records 0..{self.size - 1}")
        rng = Random(f"{self.split}/{self.seed}/{index}")
        names = sorted(SUBJECTS)
        subject = SUBJECTS[names[index % len(names)]]
        content = _content_of_split(subject, self.split, rng)
        pixels = subject.draw(content, rng)
        questions = _choose(subject.questions(content), self.turns, rng)
        return DemoSample(f"demo-{self.split}-{self.seed}-{index}", subject.name, encode_png(pixels), questions)


def is_held_out(content: Content) -> bool:
    """Decides whether a content belongs to the held-out split."""
    return zlib.crc32(repr(content).encode()) % HELD_OUT_SHARE == 0


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encodes RGB pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _content_of_split(subject: Subject, split: str, rng: Random) -> Content:
    """Draws contents until one belongs to the split."""
    while True:
        content = subject.content(rng)
        if is_held_out(content) == (split == "held_out"):
            return content


def _choose(questions: list[Question], turns: int, rng: Random) -> tuple[Question, ...]:
    """Chooses the questions to ask, of which the first is drawn by kind."""
    kind = rng.choice(sorted({question.kind for question in questions}))
    first = rng.choice([question for question in questions if question.kind == kind])
    others = [question for question in questions if question is not first]
    return first, *rng.sample(others, min(turns - 1, len(others)))
