"""Images, dense labels and questions as arrays; a function of (split, seed, count) alone."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Bool, Int, UInt8

from benchmarks.accuracy.tasks import KINDS, PAD, PART, PROMPT, TOKEN, Mark, Page, SampleImage, Split, draw_image

QUESTIONS = 2  # asked in a row, each PROMPT tokens and its answer
ROW = QUESTIONS * (PROMPT + 1)


@dataclass(frozen=True)
class Dataset:
    """Kinds take turns. Every image has `variants` rows of questions, each row another draw and order.

    parts: per patch in raster order, the parts of its mark (first, second, answer), for the encoder. marks: the tokens
    of block and answer of a highlighted patch, for the decoder. Both are padding where there is nothing.
    tokens: questions and answers one after the other."""

    pixels: UInt8[np.ndarray, "count side side 3"]
    kinds: Int[np.ndarray, " count"]
    parts: Int[np.ndarray, "count patches 3"]
    highlighted: Bool[np.ndarray, "count patches"]
    marks: Int[np.ndarray, "count patches 2"]
    tokens: Int[np.ndarray, "count variants row"]

    def __len__(self) -> int:
        return len(self.kinds)


def generate(page: Page, split: Split, count: int, *, seed: int, variants: int) -> Dataset:
    """Every seed is a data set of its own; splits never share contents."""
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
