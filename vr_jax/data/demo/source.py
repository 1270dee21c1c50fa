"""The demo set as a random-access source: record `index` is a function of (split, seed, index) and nothing else."""

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
from vr_jax.data.types import IMAGE_PLACEHOLDER, Conversation, Turn

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one content in eight is never trained on


@dataclass(frozen=True)
class DemoSample:
    """One generated image and what is asked about it, in order."""

    id: str
    subject: str
    png: bytes
    questions: tuple[Question, ...]

    def conversation(self) -> Conversation:
        turns = []
        for number, question in enumerate(self.questions):
            prefix = f"{IMAGE_PLACEHOLDER}\n" if number == 0 else ""
            turns += [Turn("user", prefix + question.text), Turn("assistant", question.answer)]
        return Conversation(id=self.id, turns=tuple(turns), images=(self.png,))


class DemoSource:
    """`size` generated conversations about one image each; picklable, random access, nothing stored.

    Splits are disjoint by construction, whatever the seeds: a content (all that a question may ask about, see
    `images`) belongs to the held-out split if and only if its CRC-32 is divisible by HELD_OUT_SHARE, and each
    record draws contents until one is of its own split. So no held-out chart (its colours and values in order),
    table (its letters and digits) or printed word (its word, ink, size and place) was ever trained on.

    Subjects take turns, so that each has the same share. Of an image's questions `turns` are asked, in random
    order; the first is drawn by kind, so that no kind of a subject is rarer than another.

    Raises ValueError for an unknown split, a negative size or turns < 1; `source[i]` raises IndexError outside
    0..size-1.
    """

    def __init__(self, split: Split, size: int, seed: int = 0, *, turns: int = 1):
        if split not in ("train", "held_out"):
            raise ValueError(f"demo split {split!r}: expected 'train' or 'held_out'")
        if size < 0 or turns < 1:
            raise ValueError(f"demo size = {size}, turns = {turns}: expected size >= 0 and turns >= 1")
        self.split = split
        self.size = size
        self.seed = seed
        self.turns = turns

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"DemoSource({self.split!r}, {self.size}, seed={self.seed}, turns={self.turns})"

    def __getitem__(self, index: int) -> Conversation:
        return self.sample(index).conversation()

    def sample(self, index: int) -> DemoSample:
        """Record `index` with its kinds and answers, for scoring."""
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
    return zlib.crc32(repr(content).encode()) % HELD_OUT_SHARE == 0


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _content_of_split(subject: Subject, split: Split, rng: Random) -> Content:
    while True:
        content = subject.content(rng)
        if is_held_out(content) == (split == "held_out"):
            return content


def _choose(questions: list[Question], turns: int, rng: Random) -> tuple[Question, ...]:
    kind = rng.choice(sorted({question.kind for question in questions}))
    first = rng.choice([question for question in questions if question.kind == kind])
    others = [question for question in questions if question is not first]
    return first, *rng.sample(others, min(turns - 1, len(others)))
