"""Turns the generated images, their dense labels and their questions into arrays.

The arrays are a function of the split, the seed and the count alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Bool, Int, UInt8

from benchmarks.accuracy.tasks import PAD, PART, PROMPT, TOKEN
from vr_jax.data.demo.pages import KINDS, Mark, Page, SampleImage, Split, draw_image

QUESTIONS = 2  # asked in a row, each PROMPT tokens and its answer
ROW = QUESTIONS * (PROMPT + 1)


@dataclass(frozen=True)
class Dataset:
    """Images and their labels. The kinds of images take turns.

    Every image has several rows of questions. Each row is another draw of questions in another order.

    Attributes:
        pixels: The images.
        kinds: The kind of each image, as its place in `KINDS`.
        parts: The parts of the mark (first, second, answer) of every patch, in raster order. The encoder learns them.
            Patches without a mark have the padding part.
        highlighted: Whether a patch is highlighted.
        marks: The tokens of block and answer of every highlighted patch, which the decoder learns; else padding.
        tokens: Questions and answers, one after the other.
    """

    pixels: UInt8[np.ndarray, "count side side 3"]
    kinds: Int[np.ndarray, " count"]
    parts: Int[np.ndarray, "count patches 3"]
    highlighted: Bool[np.ndarray, "count patches"]
    marks: Int[np.ndarray, "count patches 2"]
    tokens: Int[np.ndarray, "count variants row"]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.kinds)


def generate(page: Page, split: Split, count: int, *, seed: int, variants: int) -> Dataset:
    """Draws a data set. Every seed gives another one, and the two splits never share contents."""
    pixels = np.empty((count, page.side, page.side, 3), np.uint8)
    parts = np.full((count, page.grid**2, 3), PART[PAD], np.int8)
    marks = np.full((count, page.grid**2, 2), TOKEN[PAD], np.int16)
    highlighted = np.zeros((count, page.grid**2), bool)
    tokens = np.empty((count, variants, ROW), np.int16)
    for number in range(count):
        rng = Random(f"{split}/{seed}/{number}")
        image = draw_image(KINDS[number % len(KINDS)], page, split, rng)
        pixels[number] = image.pixels
        for mark in image.marks:
            place = mark.row * page.grid + mark.column
            parts[number, place] = PART[mark.first], PART[mark.second], PART[mark.answer]
            highlighted[number, place] = mark.highlighted
            if mark.highlighted:
                marks[number, place] = TOKEN[mark.block], TOKEN[mark.answer]
        for variant in range(variants):
            tokens[number, variant] = _row(image, rng.sample(image.highlighted, QUESTIONS))
    return Dataset(pixels, np.arange(count) % len(KINDS), parts, highlighted, marks, tokens)


def _row(image: SampleImage, questions: list[Mark]) -> list[int]:
    return [TOKEN[word] for mark in questions for word in (image.kind, mark.block, mark.answer)]
