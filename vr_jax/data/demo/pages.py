"""Generated pages to read, with answers that depend on single patches: words, small text, tables, bars and lines.

Glyphs, bar tops and markers are one patch wide, so a window of s x s patches holds several of them. One patch of every
block of 4 x 4 patches is highlighted by a pale yellow background. A question names a block, and its answer is the one
character (or height) that is highlighted there. An average over a window tells which characters the window holds, but
not which of them is highlighted. The larger the window, the less an average tells. The contents of held-out images
(their words, tables, bars and lines) never occur in training.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from vr_jax.data.demo.drawing import blank, draw_text_centred

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # One content in eight is never trained on.

LETTERS = "ACEFHJKLMNPRTUXY"
DIGITS = "123456789"
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "orange": (250, 150, 20),
    "green": (20, 160, 60),
    "blue": (30, 70, 235),
    "purple": (150, 40, 190),
    "cyan": (10, 180, 200),
    "pink": (250, 120, 190),
    "black": (20, 20, 20),
}
NUMBERS = tuple(f"#{i}" for i in range(1, 23))  # lines of a text, ticks of an axis
PLACES = tuple(f"@{i}" for i in range(1, 17))  # letters of a word or of a line
KINDS = ("word", "text", "table", "bars", "line")
NOTHING = "-"
WORD = 4  # letters

BLOCK = 4  # Patches per side of a block. Each block holds at most one highlighted patch.
PAPER, INK, SHADE, RULE = (255, 255, 255), (25, 25, 25), (214, 224, 236), (120, 120, 120)
HIGHLIGHT = (255, 246, 170)


@dataclass(frozen=True)
class Mark:
    """What one patch shows: an answer, or a part of the drawing that helps to find one.

    Attributes:
        row: Row of the patch.
        column: Column of the patch.
        first: First part of the address, for example the heading of the table's row or the colour of the line.
        second: Second part of the address, for example the heading of the column or the tick of the axis.
        answer: The answer, or `NOTHING`.
        highlighted: Whether the patch has a yellow background, so that a question asks for it.
    """

    row: int
    column: int
    first: str
    second: str
    answer: str
    highlighted: bool = False

    @property
    def block(self) -> str:
        """The word for the block of the patch."""
        return f"block {self.row // BLOCK},{self.column // BLOCK}"


@dataclass(frozen=True)
class Page:
    """The size of an image: `grid` x `grid` patches of `patch` pixels."""

    grid: int = 12
    patch: int = 8

    @property
    def side(self) -> int:
        """Pixels per side."""
        return self.grid * self.patch


@dataclass(frozen=True)
class SampleImage:
    """An image with its marks; `content` is what the answers depend on."""

    kind: str
    content: tuple
    pixels: UInt8[np.ndarray, "side side 3"]
    marks: tuple[Mark, ...]

    @property
    def highlighted(self) -> list[Mark]:
        """The marks that questions can ask for."""
        return [mark for mark in self.marks if mark.highlighted]


class Canvas:
    """Draws at patch coordinates, which are all shifted by the same few pixels."""

    def __init__(self, page: Page, rng: Random):
        """Starts with an empty page and draws the shift."""
        self.page = page
        self.pixels = blank(page.side, page.side, PAPER)
        slack = page.patch // 4
        self.left, self.top = rng.randint(-slack, slack), rng.randint(-slack, slack)

    def glyph(self, text: str, row: int, column: int, colour: tuple[int, int, int] = INK) -> None:
        """Draws a character that fills a patch."""
        size = self.page.patch + 1

        def centre(place: int, shift: int) -> int:
            pixel = int((place + 0.5) * self.page.patch) + shift
            return min(max(pixel, size // 2), self.page.side - size // 2 - 1)

        draw_text_centred(self.pixels, text, size, centre(column, self.left), centre(row, self.top), colour)

    def box(self, rows: tuple[float, float], columns: tuple[float, float], colour: tuple[int, int, int]) -> None:
        """Fills a rectangle; `rows` and `columns` hold its edges in patches, which may be fractions."""
        (top, bottom), (left, right) = (
            (max(0, round(edge * self.page.patch) + shift) for edge in edges)
            for edges, shift in ((rows, self.top), (columns, self.left))
        )
        self.pixels[top:bottom, left:right] = colour


def draw_image(kind: str, page: Page, split: Split, rng: Random, *, never: Collection[int] = ()) -> SampleImage:
    """Draws an image of a kind with contents of a split.

    Args:
        kind: One of `KINDS`.
        page: The size of the image.
        split: The split of the contents.
        rng: Draws everything that is random.
        never: Rows and columns of patches in which nothing is highlighted.
    """
    canvas = Canvas(page, rng)
    lay_out, draw = _KINDS[kind]
    marks = _highlight(list(lay_out(page.grid, split, rng)), rng, never)
    for mark in marks:
        if mark.highlighted:
            canvas.box((mark.row, mark.row + 1), (mark.column, mark.column + 1), HIGHLIGHT)
    draw(canvas, marks)
    content = tuple((mark.first, mark.second, mark.answer) for mark in marks)
    return SampleImage(kind, content, canvas.pixels, marks)


def _highlight(marks: list[Mark], rng: Random, never: Collection[int]) -> tuple[Mark, ...]:
    """Highlights one answer of every block, so that a window of up to 4 x 4 patches seldom holds two."""
    blocks: dict[str, list[int]] = {}
    for number, mark in enumerate(marks):
        if mark.answer != NOTHING and mark.row not in never and mark.column not in never:
            blocks.setdefault(mark.block, []).append(number)
    chosen = {rng.choice(numbers) for numbers in blocks.values()}
    return tuple(replace(mark, highlighted=number in chosen) for number, mark in enumerate(marks))


def is_held_out(content: object) -> bool:
    """Whether a content belongs to the held-out split, which a hash decides."""
    return zlib.crc32(repr(content).encode()) % HELD_OUT_SHARE == 0


def _of_split[T](make: Callable[[], T], split: Split) -> T:
    while True:
        content = make()
        if is_held_out(content) == (split == "held_out"):
            return content


def _word(split: Split, rng: Random) -> str:
    """Random letters, so that a word of the held-out split cannot be guessed."""
    return _of_split(lambda: "".join(rng.choices(LETTERS, k=WORD)), split)


def _lay_out_words(grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Words in different colours, scattered over rows of their own; an address is a colour and a letter."""
    count = min(grid // 2, len(COLOURS))
    for row, colour in zip(sorted(rng.sample(range(grid), count)), rng.sample(list(COLOURS), count), strict=True):
        left = rng.randint(0, grid - WORD)
        for index, letter in enumerate(_word(split, rng)):
            yield Mark(row, left + index, colour, PLACES[index], letter)


def _lay_out_text(grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """A page full of black words; an address is a line and a letter in the line."""
    top, left = rng.randint(0, 1), rng.randint(0, 1)
    for line in range(grid - 2):
        for number in range((grid - 1) // (WORD + 1)):
            column = left + number * (WORD + 1)
            for index, letter in enumerate(_word(split, rng)):
                yield Mark(top + line, column + index, NUMBERS[line], PLACES[number * WORD + index], letter)


def _draw_letters(canvas: Canvas, marks: Iterable[Mark]) -> None:
    for mark in marks:
        canvas.glyph(mark.answer, mark.row, mark.column, COLOURS.get(mark.first, INK))


def _lay_out_table(grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Digits in rows and columns that are headed by letters in a fixed order; an address is both headings."""
    rows, columns = min(grid - 3, 8), min((grid - 2) // 2, 8)
    row_letters, column_letters = LETTERS[:rows], LETTERS[-columns:]
    digits = _of_split(lambda: tuple("".join(rng.choices(DIGITS, k=columns)) for _ in range(rows)), split)
    top, left = rng.randint(0, 1), rng.randint(0, 1)
    for j, letter in enumerate(column_letters):
        yield Mark(top, left + 2 * j + 2, NOTHING, letter, NOTHING)
    for i, letter in enumerate(row_letters):
        yield Mark(top + i + 1, left, letter, NOTHING, NOTHING)
        for j, digit in enumerate(digits[i]):
            yield Mark(top + i + 1, left + 2 * j + 2, letter, column_letters[j], digit)


def _draw_table(canvas: Canvas, marks: Iterable[Mark]) -> None:
    for mark in marks:
        text = mark.answer
        if text == NOTHING:
            text = mark.second if mark.first == NOTHING else mark.first
            canvas.box((mark.row, mark.row + 1), (mark.column, mark.column + 1), SHADE)
        canvas.glyph(text, mark.row, mark.column)


def _lay_out_bars(grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Bars one patch wide, side by side; an address is a colour, the answer the height, shown by the top patch."""
    colours = rng.sample(list(COLOURS), len(COLOURS))
    heights = _of_split(lambda: tuple(zip(colours, rng.choices(DIGITS, k=len(colours)), strict=True)), split)
    left, floor = rng.randint(0, grid - len(colours)), grid - 1 - rng.randint(0, 1)
    for column, (colour, height) in enumerate(heights, start=left):
        top = floor - int(height)
        yield Mark(top, column, colour, NOTHING, height)
        for row in range(top + 1, floor):
            yield Mark(row, column, colour, NOTHING, NOTHING)


def _draw_bars(canvas: Canvas, marks: Iterable[Mark]) -> None:
    floor = max(mark.row for mark in marks) + 1
    canvas.box((floor, floor + 1 / canvas.page.patch), (0, canvas.page.grid), RULE)
    for mark in marks:
        inset = 0.0 if mark.answer == NOTHING else 0.25  # The background stays visible above the bar.
        canvas.box((mark.row + inset, mark.row + 1), (mark.column + 1 / 8, mark.column + 7 / 8), COLOURS[mark.first])


def _lay_out_line(grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Two coloured lines with a marker at every tick; an address is a colour and a tick, the answer the height."""
    colours, ticks = rng.sample(list(COLOURS), 2), grid - 2

    def heights() -> tuple[str, ...]:
        return tuple("".join(pair) for pair in (rng.sample(DIGITS, 2) for _ in range(ticks)))

    left, floor = rng.randint(0, 1), grid - 1 - rng.randint(0, 1)
    values = _of_split(heights, split)
    for series, colour in enumerate(colours):
        for tick in range(ticks):
            yield Mark(floor - int(values[tick][series]), left + tick, colour, NUMBERS[tick], values[tick][series])


def _draw_line(canvas: Canvas, marks: Sequence[Mark]) -> None:
    patch = canvas.page.patch
    floor = marks[0].row + int(marks[0].answer)
    canvas.box((floor, floor + 1 / patch), (0, canvas.page.grid), RULE)
    for start, stop in itertools.pairwise(marks):
        for part in range(patch if start.first == stop.first else 0):
            row = start.row + 0.5 + (stop.row - start.row) * part / patch
            column = start.column + 0.5 + part / patch
            canvas.box((row, row + 1 / patch), (column, column + 1 / patch), COLOURS[start.first])
    for mark in marks:
        canvas.box((mark.row + 0.2, mark.row + 0.8), (mark.column + 0.2, mark.column + 0.8), COLOURS[mark.first])


_LayOut = Callable[[int, Split, Random], Iterator[Mark]]
_Draw = Callable[[Canvas, tuple[Mark, ...]], None]
_KINDS: dict[str, tuple[_LayOut, _Draw]] = {
    "word": (_lay_out_words, _draw_letters),
    "text": (_lay_out_text, _draw_letters),
    "table": (_lay_out_table, _draw_table),
    "bars": (_lay_out_bars, _draw_bars),
    "line": (_lay_out_line, _draw_line),
}
