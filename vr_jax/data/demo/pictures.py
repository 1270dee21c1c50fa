"""What the demo asks about: bar charts, tables and printed words, with the questions each picture can answer.

A picture has two parts. Its *content* is a tuple of everything a question may ask about (digits, letters, colours,
words, in order); its *looks* (position, size) are drawn afterwards. Training and held-out pictures differ in content.
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
ROW_LETTERS = "ABCDEF"
COLUMN_LETTERS = "UVWXYZ"
WORDS = (
    "ant", "bear", "cat", "crow", "deer", "dog", "duck", "emu", "fish", "fox", "frog", "goat",
    "hare", "hen", "ibis", "kiwi", "lion", "mole", "newt", "owl", "pig", "seal", "swan", "wolf",
)  # fmt: skip

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
    """One kind of picture. `draw` is pure in (content, rng); `questions` depends on the content alone."""

    name: str
    width: int  # pixels
    height: int

    def content(self, rng: Random) -> Content: ...
    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "height width 3"]: ...
    def questions(self, content: Content) -> list[Question]: ...


class Chart:
    """Bars of different colours and heights with their values printed above. Content: (colour, value) from the left."""

    name = "chart"
    width, height = 96, 48

    def content(self, rng: Random) -> Content:
        count = rng.randint(2, 4)
        return tuple(zip(rng.sample(list(INKS), count), rng.sample(DIGITS, count), strict=True))

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 96 3"]:
        canvas = blank(self.width, self.height, PAPER)
        floor = self.height - 2
        canvas[floor] = RULE
        slot = self.width // len(content)
        for position, (colour, value) in enumerate(content):
            centre = slot * position + slot // 2 + rng.randint(-1, 1)
            top = floor - 3 * int(value) - 3
            canvas[top:floor, centre - 8 : centre + 8] = INKS[colour]
            draw_text_centred(canvas, value, 14, centre, top - 7, TEXT)
        return canvas

    def questions(self, content: Content) -> list[Question]:
        tallest = max(content, key=lambda bar: bar[1])[0]
        return [
            *(Question("chart_value", f"What is the value of the {c} bar?", value) for c, value in content),
            Question("chart_tallest", "Which colour is the tallest bar?", tallest),
            Question("chart_count", "How many bars are there?", str(len(content))),
        ]


class Table:
    """Digits in rows and columns headed by letters. Content: (row letters, column letters, digits by row)."""

    name = "table"
    width, height = 48, 96
    row_count, column_count = 3, 2

    def content(self, rng: Random) -> Content:
        rows = rng.sample(ROW_LETTERS, self.row_count)
        columns = rng.sample(COLUMN_LETTERS, self.column_count)
        digits = [tuple(rng.choices(DIGITS, k=self.column_count)) for _ in rows]
        return tuple(sorted(rows)), tuple(sorted(columns)), tuple(digits)

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "96 48 3"]:
        rows, columns, digits = content
        canvas = blank(self.width, self.height, PAPER)
        cell_width, cell_height = self.width // (len(columns) + 1), self.height // (len(rows) + 1)
        canvas[:cell_height] = SHADE
        canvas[:, :cell_width] = SHADE
        canvas[cell_height::cell_height] = RULE
        canvas[:, cell_width::cell_width] = RULE
        shift_x, shift_y = rng.randint(-1, 1), rng.randint(-2, 2)

        def write(row: int, column: int, text: str) -> None:
            centre_x = cell_width * column + cell_width // 2 + shift_x
            centre_y = cell_height * row + cell_height // 2 + shift_y
            draw_text_centred(canvas, text, 14, centre_x, centre_y, TEXT)

        for column, letter in enumerate(columns):
            write(0, column + 1, letter)
        for row, letter in enumerate(rows):
            write(row + 1, 0, letter)
            for column, digit in enumerate(digits[row]):
                write(row + 1, column + 1, digit)
        return canvas

    def questions(self, content: Content) -> list[Question]:
        rows, columns, digits = content
        return [
            Question("table_cell", f"What is in row {row}, column {column}?", digits[i][j])
            for i, row in enumerate(rows)
            for j, column in enumerate(columns)
        ]


class Word:
    """One word in coloured ink. Content: (word, ink, type size, column, row), of which the place is in pixels."""

    name = "word"
    width, height = 96, 48
    sizes = (20, 24)

    def content(self, rng: Random) -> Content:
        word, size = rng.choice(WORDS), rng.choice(self.sizes)
        height, width = text_mask(word, size).shape[:2]
        left, top = rng.randint(2, self.width - 2 - width), rng.randint(2, self.height - 2 - height)
        return word, rng.choice(list(INKS)), size, left, top

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 96 3"]:
        word, ink, size, left, top = content
        canvas = blank(self.width, self.height, PAPER)
        draw_text(canvas, word, size, left, top, INKS[ink])
        return canvas

    def questions(self, content: Content) -> list[Question]:
        word, ink = content[:2]
        return [
            Question("word_read", "What is the word?", word),
            Question("word_colour", "What colour is the word?", ink),
            Question("word_first_letter", "What is the first letter?", word[0]),
            Question("word_last_letter", "What is the last letter?", word[-1]),
        ]


SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (Chart(), Table(), Word())}
