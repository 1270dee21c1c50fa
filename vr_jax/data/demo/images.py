"""What the demo asks about: bar charts, tables and printed words, with the questions each image can answer.

An image has two parts. Its *content* is a tuple of everything a question may ask about (digits, letters, colours,
words, in order); its *looks* (position, size) are drawn afterwards. Training and held-out images differ in content.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from vr_jax.data.demo.drawing import blank, draw_text, draw_text_centred, text_mask

Content = tuple

INKS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 150, 30),
    "green": (22, 150, 70),
    "blue": (37, 90, 225),
    "purple": (150, 60, 200),
    "black": (25, 25, 25),
}
DIGITS = "123456789"
ROW_LETTERS = "AB"
COLUMN_LETTERS = "XY"
WORDS = ("ant", "bee", "cat", "cow", "dog", "elk", "fox", "hen", "owl", "pig", "rat", "yak")
SIDE = 48  # pixels of every image

PAPER = (255, 255, 255)
TEXT = (20, 20, 20)
RULE = (150, 158, 170)
SHADE = (226, 232, 240)


@dataclass(frozen=True)
class Question:
    kind: str  # e.g. "chart_value"; every kind belongs to one subject
    text: str
    answer: str


class Subject(Protocol):
    """One kind of image. `draw` is pure in (content, rng); `questions` depends on the content alone."""

    name: str

    def content(self, rng: Random) -> Content: ...
    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]: ...
    def questions(self, content: Content) -> list[Question]: ...


class Chart:
    """Bars of different colours and heights with their values printed below. Content: (colour, value) from the left."""

    name = "chart"
    text_size = 11

    def content(self, rng: Random) -> Content:
        count = rng.randint(2, 4)
        return tuple(zip(rng.sample(list(INKS), count), rng.sample(DIGITS, count), strict=True))

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        canvas = blank(SIDE, SIDE, PAPER)
        floor = SIDE - 12
        canvas[floor] = RULE
        slot = SIDE // len(content)
        for position, (colour, value) in enumerate(content):
            centre = slot * position + slot // 2 + rng.randint(-1, 1)
            canvas[floor - 3 * int(value) - 2 : floor, centre - 4 : centre + 4] = INKS[colour]
            draw_text_centred(canvas, value, self.text_size, centre, floor + 6, TEXT)
        return canvas

    def questions(self, content: Content) -> list[Question]:
        by_value = sorted(content, key=lambda bar: bar[1])
        return [
            *(Question("chart_value", f"What is the value of the {c} bar?", value) for c, value in content),
            Question("chart_tallest", "Which colour is the tallest bar?", by_value[-1][0]),
            Question("chart_shortest", "Which colour is the shortest bar?", by_value[0][0]),
            Question("chart_count", "How many bars are there?", str(len(content))),
        ]


class Table:
    """Digits in rows and columns headed by letters. Content: the digits by row."""

    name = "table"
    text_size = 12

    def content(self, rng: Random) -> Content:
        return tuple(tuple(rng.choices(DIGITS, k=len(COLUMN_LETTERS))) for _ in ROW_LETTERS)

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        canvas = blank(SIDE, SIDE, PAPER)
        cell = SIDE // (len(ROW_LETTERS) + 1)
        canvas[:cell] = SHADE
        canvas[:, :cell] = SHADE
        canvas[cell::cell] = RULE
        canvas[:, cell::cell] = RULE
        shift_x, shift_y = rng.randint(-1, 1), rng.randint(-1, 1)
        lines = [("", *COLUMN_LETTERS), *((letter, *row) for letter, row in zip(ROW_LETTERS, content, strict=True))]
        for i, line in enumerate(lines):
            for j, text in enumerate(line):
                if text:
                    centre = (cell * j + cell // 2 + shift_x, cell * i + cell // 2 + shift_y)
                    draw_text_centred(canvas, text, self.text_size, *centre, TEXT)
        return canvas

    def questions(self, content: Content) -> list[Question]:
        return [
            Question("table_cell", f"What is in row {row}, column {column}?", content[i][j])
            for i, row in enumerate(ROW_LETTERS)
            for j, column in enumerate(COLUMN_LETTERS)
        ]


class Word:
    """One word in coloured ink. Content: (word, ink, column, row), the place in pixels."""

    name = "word"
    text_size = 18

    def content(self, rng: Random) -> Content:
        word = rng.choice(WORDS)
        height, width = text_mask(word, self.text_size).shape[:2]
        left, top = (SIDE - width) // 2 + rng.randint(-2, 2), (SIDE - height) // 2 + rng.randint(-2, 2)
        return word, rng.choice(list(INKS)), left, top

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        word, ink, left, top = content
        canvas = blank(SIDE, SIDE, PAPER)
        draw_text(canvas, word, self.text_size, left, top, INKS[ink])
        return canvas

    def questions(self, content: Content) -> list[Question]:
        word, ink = content[:2]
        return [
            Question("word_read", "What is the word?", word),
            Question("word_colour", "What colour is the word?", ink),
        ]


SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (Chart(), Table(), Word())}
