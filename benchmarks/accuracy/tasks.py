"""Generated reading tasks whose answers hang on single patches: words, small text, tables, bar and line charts.

Glyphs, bars and markers are one patch wide, so a window of s x s patches holds several of them; their average says
which are there, but not which is where. A question is always (kind, address), such as a row and a column, and its
answer one character. Contents of held-out pictures (their words, tables, bars, lines) never occur in training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from vr_jax.data.demo.drawing import blank, draw_text_centred

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one content in eight is never trained on

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
PAD, NOTHING = "<pad>", "-"
WORD = 4  # letters

# What a patch shows, in parts: the classes of the encoder's heads.
PARTS = (PAD, NOTHING, *LETTERS, *DIGITS, *NUMBERS, *COLOURS, *PLACES)
PART = {name: number for number, name in enumerate(PARTS)}

# The decoder's vocabulary. A place that can be asked for ("row A, column U") is one word, as a cell's name is in a
# spreadsheet. Named by two words, both have to be matched by one attention head at once; trained from scratch, a small
# decoder then matches them one by one and answers with what occurs in the right row and in the right column.
ADDRESSES = (
    *(colour + place for colour in COLOURS for place in PLACES[:WORD]),  # word
    *(line + place for line in NUMBERS for place in PLACES),  # text
    *(row + column for row in LETTERS[:8] for column in LETTERS[-8:]),  # table
    *(colour + NOTHING for colour in COLOURS),  # bars
    *(colour + tick for colour in COLOURS for tick in NUMBERS),  # line
)
VOCABULARY = (PAD, *KINDS, *LETTERS, *DIGITS, *ADDRESSES)
TOKEN = {name: number for number, name in enumerate(VOCABULARY)}
PROMPT = 2  # tokens of a question, its kind and its address; the answer is one token

PAPER, INK, SHADE, RULE = (255, 255, 255), (25, 25, 25), (214, 224, 236), (120, 120, 120)


@dataclass(frozen=True)
class Mark:
    """What one patch shows: the answer to the question for (first, second), or a part that bears on it (no answer)."""

    row: int
    column: int
    first: str
    second: str
    answer: str

    @property
    def address(self) -> str:
        return self.first + self.second


@dataclass(frozen=True)
class Page:
    """The size of a picture: `grid` x `grid` patches of `patch` pixels."""

    grid: int = 12
    patch: int = 8

    @property
    def side(self) -> int:
        return self.grid * self.patch


@dataclass(frozen=True)
class Picture:
    kind: str
    content: tuple  # what the answers depend on
    pixels: UInt8[np.ndarray, "side side 3"]
    marks: tuple[Mark, ...]

    @property
    def questions(self) -> list[Mark]:
        return [mark for mark in self.marks if mark.answer != NOTHING]


class Canvas:
    """Draws by patch coordinates, all shifted by the same few pixels."""

    def __init__(self, page: Page, rng: Random):
        self.page = page
        self.pixels = blank(page.side, page.side, PAPER)
        slack = page.patch // 4
        self.left, self.top = rng.randint(-slack, slack), rng.randint(-slack, slack)

    def glyph(self, text: str, row: int, column: int, colour: tuple[int, int, int] = INK) -> None:
        size = self.page.patch + 1
        centre = [
            min(max(int((place + 0.5) * self.page.patch) + shift, size // 2), self.page.side - size // 2 - 1)
            for place, shift in ((column, self.left), (row, self.top))
        ]
        draw_text_centred(self.pixels, text, size, *centre, colour)

    def box(self, rows: tuple[float, float], columns: tuple[float, float], colour: tuple[int, int, int]) -> None:
        """Fills from the first to the second of `rows` and `columns` (patches, may be fractions)."""
        (top, bottom), (left, right) = (
            (max(0, round(edge * self.page.patch) + shift) for edge in edges)
            for edges, shift in ((rows, self.top), (columns, self.left))
        )
        self.pixels[top:bottom, left:right] = colour


def draw_picture(kind: str, page: Page, split: Split, rng: Random) -> Picture:
    canvas = Canvas(page, rng)
    marks = tuple(_DRAW[kind](canvas, page.grid, split, rng))
    content = tuple((mark.first, mark.second, mark.answer) for mark in marks)
    return Picture(kind, content, canvas.pixels, marks)


def is_held_out(content: object) -> bool:
    return zlib.crc32(repr(content).encode()) % HELD_OUT_SHARE == 0


def _of_split[T](make: Callable[[], T], split: Split) -> T:
    while True:
        content = make()
        if is_held_out(content) == (split == "held_out"):
            return content


def _word(split: Split, rng: Random) -> str:
    """Random letters: held-out words never occur in training, and cannot be guessed."""
    return _of_split(lambda: "".join(rng.choices(LETTERS, k=WORD)), split)


def _draw_words(canvas: Canvas, grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Words in different colours, scattered over rows of their own; a question gives the colour and the letter."""
    count = min(grid // 2, len(COLOURS))
    for row, colour in zip(sorted(rng.sample(range(grid), count)), rng.sample(list(COLOURS), count), strict=True):
        left = rng.randint(0, grid - WORD)
        for index, letter in enumerate(_word(split, rng)):
            canvas.glyph(letter, row, left + index, COLOURS[colour])
            yield Mark(row, left + index, colour, PLACES[index], letter)


def _draw_text(canvas: Canvas, grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """A page full of black words; a question gives the line and the letter in the line."""
    top, left = rng.randint(0, 1), rng.randint(0, 1)
    for line in range(grid - 2):
        for number in range((grid - 1) // (WORD + 1)):
            column = left + number * (WORD + 1)
            for index, letter in enumerate(_word(split, rng)):
                canvas.glyph(letter, top + line, column + index)
                yield Mark(top + line, column + index, NUMBERS[line], PLACES[number * WORD + index], letter)


def _draw_table(canvas: Canvas, grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Digits in rows and columns that are headed by letters in a fixed order; a question gives both headings."""
    rows, columns = min(grid - 3, 8), min((grid - 2) // 2, 8)
    row_letters, column_letters = LETTERS[:rows], LETTERS[-columns:]
    digits = _of_split(lambda: tuple("".join(rng.choices(DIGITS, k=columns)) for _ in range(rows)), split)
    top, left = rng.randint(0, 1), rng.randint(0, 1)
    canvas.box((top, top + 1), (left, left + 2 * columns + 1), SHADE)
    canvas.box((top, top + rows + 1), (left, left + 1), SHADE)
    for j, letter in enumerate(column_letters):
        canvas.glyph(letter, top, left + 2 * j + 2)
        yield Mark(top, left + 2 * j + 2, NOTHING, letter, NOTHING)
    for i, letter in enumerate(row_letters):
        canvas.glyph(letter, top + i + 1, left)
        yield Mark(top + i + 1, left, letter, NOTHING, NOTHING)
        for j, digit in enumerate(digits[i]):
            canvas.glyph(digit, top + i + 1, left + 2 * j + 2)
            yield Mark(top + i + 1, left + 2 * j + 2, letter, column_letters[j], digit)


def _draw_bars(canvas: Canvas, grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Bars one patch wide, side by side; a question names the colour, the answer is the height."""
    colours = rng.sample(list(COLOURS), len(COLOURS))
    heights = _of_split(lambda: tuple(zip(colours, rng.choices(DIGITS, k=len(colours)), strict=True)), split)
    left, floor = rng.randint(0, grid - len(colours)), grid - 1 - rng.randint(0, 1)
    canvas.box((floor, floor + 1 / canvas.page.patch), (0, grid), RULE)
    for column, (colour, height) in enumerate(heights, start=left):
        top = floor - int(height)
        canvas.box((top, floor), (column + 1 / 8, column + 7 / 8), COLOURS[colour])
        yield Mark(top, column, colour, NOTHING, height)
        for row in range(top + 1, floor):
            yield Mark(row, column, colour, NOTHING, NOTHING)


def _draw_line(canvas: Canvas, grid: int, split: Split, rng: Random) -> Iterator[Mark]:
    """Two coloured lines with a marker at every tick; a question gives colour and tick, the answer is the height."""
    colours, ticks = rng.sample(list(COLOURS), 2), grid - 2

    def heights() -> tuple[str, ...]:
        return tuple("".join(pair) for pair in (rng.sample(DIGITS, 2) for _ in range(ticks)))

    left, floor = rng.randint(0, 1), grid - 1 - rng.randint(0, 1)
    canvas.box((floor, floor + 1 / canvas.page.patch), (0, grid), RULE)
    values = _of_split(heights, split)
    for series, colour in enumerate(colours):
        for tick in range(ticks - 1):
            start, stop = (floor - int(values[t][series]) + 0.5 for t in (tick, tick + 1))
            for part in range(canvas.page.patch):
                row = start + (stop - start) * part / canvas.page.patch
                column = left + tick + 0.5 + part / canvas.page.patch
                canvas.box(
                    (row, row + 1 / canvas.page.patch), (column, column + 1 / canvas.page.patch), COLOURS[colour]
                )
    for series, colour in enumerate(colours):
        for tick in range(ticks):
            row = floor - int(values[tick][series])
            canvas.box((row + 0.2, row + 0.8), (left + tick + 0.2, left + tick + 0.8), COLOURS[colour])
            yield Mark(row, left + tick, colour, NUMBERS[tick], values[tick][series])


_DRAW: dict[str, Callable[[Canvas, int, Split, Random], Iterator[Mark]]] = {
    "word": _draw_words,
    "text": _draw_text,
    "table": _draw_table,
    "bars": _draw_bars,
    "line": _draw_line,
}
