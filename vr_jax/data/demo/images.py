"""The images of the demo (bar charts, tables and printed words) and the questions that each can answer.

The *content* of an image is a tuple of everything that a question may ask about, such as digits, colours and words.
Random details, such as small shifts, are chosen when the content is drawn. Training and held-out images differ in
content.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

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
# The side of every image in pixels.
SIDE = 48

PAPER = (255, 255, 255)
TEXT = (20, 20, 20)
RULE = (150, 158, 170)
SHADE = (226, 232, 240)


@dataclass(frozen=True)
class Question:
    """A question about an image with its only right answer.

    Attributes:
        kind: The kind of question, such as "chart_value". Every kind belongs to one subject.
        text: The question.
        answer: The answer.
    """

    kind: str
    text: str
    answer: str


@runtime_checkable
class Subject(Protocol):
    """One kind of image.

    Attributes:
        name: The name, with which the kinds of its questions begin.
        text_size: The size of its text in pixels.
    """

    name: str
    text_size: int

    def content(self, rng: Random) -> Content:
        """Returns a random content."""
        ...

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        """Draws a content. The pixels depend on the content and the state of `rng` alone."""
        ...

    def questions(self, content: Content) -> list[Question]:
        """Returns all questions that the image answers. They depend on the content alone."""
        ...


class Chart:
    """Bars of different colours and heights with their values printed below.

    The content is the (colour, value) of each bar from the left.
    """

    name = "chart"
    text_size = 11

    def content(self, rng: Random) -> Content:
        """Returns a random content."""
        count = rng.randint(2, 4)
        return tuple(zip(rng.sample(list(INKS), count), rng.sample(DIGITS, count), strict=True))

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        """Draws a content."""
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
        """Returns all questions that the image answers."""
        by_value = sorted(content, key=lambda bar: bar[1])
        return [
            *(Question("chart_value", f"What is the value of the {c} bar?", value) for c, value in content),
            Question("chart_tallest", "Which colour is the tallest bar?", by_value[-1][0]),
            Question("chart_shortest", "Which colour is the shortest bar?", by_value[0][0]),
            Question("chart_count", "How many bars are there?", str(len(content))),
        ]


class Table:
    """Digits in rows and columns with letters as headings.

    The content is the digits of each row.
    """

    name = "table"
    text_size = 12

    def content(self, rng: Random) -> Content:
        """Returns a random content."""
        return tuple(tuple(rng.choices(DIGITS, k=len(COLUMN_LETTERS))) for _ in ROW_LETTERS)

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        """Draws a content."""
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
        """Returns all questions that the image answers."""
        return [
            Question("table_cell", f"What is in row {row}, column {column}?", content[i][j])
            for i, row in enumerate(ROW_LETTERS)
            for j, column in enumerate(COLUMN_LETTERS)
        ]


class Word:
    """One coloured word.

    The content is (word, colour, left, top), with the position in pixels.
    """

    name = "word"
    text_size = 18

    def content(self, rng: Random) -> Content:
        """Returns a random content."""
        word = rng.choice(WORDS)
        height, width = text_mask(word, self.text_size).shape[:2]
        left, top = (SIDE - width) // 2 + rng.randint(-2, 2), (SIDE - height) // 2 + rng.randint(-2, 2)
        return word, rng.choice(list(INKS)), left, top

    def draw(self, content: Content, rng: Random) -> UInt8[np.ndarray, "48 48 3"]:
        """Draws a content."""
        word, ink, left, top = content
        canvas = blank(SIDE, SIDE, PAPER)
        draw_text(canvas, word, self.text_size, left, top, INKS[ink])
        return canvas

    def questions(self, content: Content) -> list[Question]:
        """Returns all questions that the image answers."""
        word, ink = content[:2]
        return [
            Question("word_read", "What is the word?", word),
            Question("word_colour", "What colour is the word?", ink),
        ]


# Every subject by its name.
SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (Chart(), Table(), Word())}
