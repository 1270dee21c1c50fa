"""Draws samples with the sizes of LLaVA-NeXT-Data, which is not part of this repository.

The numbers of samples of `MIXTURE` are those of LLaVA-1.5's 665K (its paper, Table 7) without TextCaps, and those that
the card of lmms-lab/LLaVA-NeXT-Data (779,289 samples) adds. The card gives 136K samples for several sets together,
which are divided in proportion to the published sizes of those sets. Images have the usual sizes of each set. The
numbers of turns and the lengths of text are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vr_jax.data import tiling
from vr_jax.model.config import VlmConfig

SYSTEM, TURN = 11, 10  # ChatML adds so many tokens for the system message, and for a question with its answer.
LONGEST_TEXT = 2048  # LLaVA cut ShareGPT's conversations to so many tokens.


@dataclass(frozen=True)
class Part:
    """A part of the mixture.

    Attributes:
        name: The name of the data set.
        thousands: Its number of samples in thousands.
        images: The kind of its images, a key of `COMMON_SIZES` or `UNIFORM_SIZES`, or "web"; None for text only.
        turns: The fewest and the most pairs of question and answer in a sample.
        question: The mean number of tokens of a question.
        answer: The mean number of tokens of an answer.
        spread: The sigma of the log-normal distribution of both.
    """

    name: str
    thousands: int
    images: str | None
    turns: tuple[int, int]
    question: float
    answer: float
    spread: float


MIXTURE = (
    Part("LLaVA conversation", 58, "coco", (2, 6), 12, 30, 0.5),
    Part("LLaVA detail", 23, "coco", (1, 1), 15, 130, 0.3),
    Part("LLaVA reasoning", 77, "coco", (1, 1), 18, 130, 0.3),
    Part("ShareGPT", 40, None, (1, 8), 60, 220, 0.9),
    Part("VQAv2", 83, "coco", (3, 8), 9, 2, 0.3),
    Part("GQA", 72, "genome", (5, 20), 11, 1, 0.3),
    Part("OKVQA", 9, "coco", (1, 1), 20, 2, 0.3),
    Part("OCR-VQA", 80, "cover", (3, 6), 9, 6, 0.5),
    Part("A-OKVQA", 66, "coco", (1, 1), 45, 2, 0.3),
    Part("RefCOCO", 49, "coco", (1, 10), 20, 14, 0.4),
    Part("Visual Genome", 86, "genome", (5, 12), 22, 18, 0.4),
    Part("DocVQA", 10, "document", (1, 8), 14, 6, 0.5),
    Part("SynDog-EN", 30, "synthetic", (1, 1), 15, 150, 0.6),
    Part("ChartQA", 18, "chart", (1, 3), 22, 3, 0.4),
    Part("DVQA", 20, "plot", (1, 3), 20, 3, 0.3),
    Part("AI2D", 12, "diagram", (1, 3), 45, 2, 0.4),
    Part("LAION-GPT-V", 11, "web", (1, 1), 20, 220, 0.4),
    Part("ShareGPT4V", 20, "web", (1, 1), 12, 190, 0.35),
    Part("demo users", 15, "web", (1, 3), 30, 200, 0.6),
)
# The sizes (width, height) of images, the shares of these sizes, and the share of images turned to portrait format.
COMMON_SIZES = {
    "coco": ([(640, 480), (640, 427), (640, 426), (640, 360), (640, 500)], [0.4, 0.3, 0.05, 0.1, 0.15], 0.27),
    "genome": ([(500, 375), (500, 333), (800, 600), (1024, 768), (640, 480)], [0.35, 0.2, 0.25, 0.1, 0.1], 0.25),
    "chart": ([(800, 557), (850, 600), (320, 400)], [0.8, 0.15, 0.05], 0.0),
    "plot": ([(448, 448)], [1.0], 0.0),
}
UNIFORM_SIZES = {  # The limits of width and of height, each of which is uniform between them.
    "cover": ((300, 400), (500, 501)),
    "document": ((1200, 2000), (1600, 2400)),
    "synthetic": ((600, 1600), (600, 1600)),
    "diagram": ((250, 1400), (250, 1100)),
}
CAPTION = (14.0, 0.45)  # The mean number of tokens of a BLIP caption in phase 1, and the sigma of the logarithm.


@dataclass(frozen=True)
class Sample:
    """The size of a sample before its image is cut into tiles.

    Attributes:
        text: Tokens of text.
        image: Width and height of the image in pixels, or None without an image.
    """

    text: int
    image: tuple[int, int] | None

    def size(self, config: VlmConfig) -> tuple[int, int]:
        """The numbers of tokens and of tiles under the tiling and the ratio of a model."""
        if self.image is None:
            return self.text, 0
        layout = tiling.layout(self.image, config)
        return self.text + len(layout.cell), layout.tiles


def mixture(count: int, seed: int = 0) -> list[Sample]:
    """Draws samples of `MIXTURE` in random order."""
    rng = np.random.default_rng(seed)
    shares = np.asarray([part.thousands for part in MIXTURE], float)
    return [_sample(MIXTURE[k], rng) for k in rng.choice(len(MIXTURE), count, p=shares / shares.sum())]


def _sample(part: Part, rng: np.random.Generator) -> Sample:
    """Draws a sample of one part."""
    turns = int(rng.integers(part.turns[0], part.turns[1] + 1))
    words = sum(_lengths(mean, part.spread, turns, rng).sum() for mean in (part.question, part.answer))
    text = SYSTEM + TURN * turns + int(words)
    if part.images is None:
        return Sample(min(text, LONGEST_TEXT), None)
    return Sample(text + 1, _image(part.images, rng))  # One token is the newline after <image>.


def _lengths(mean: float, spread: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws log-normal lengths of texts with the given mean, at least 1 each."""
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.maximum(1, np.round(drawn)).astype(int)


def _image(kind: str, rng: np.random.Generator) -> tuple[int, int]:
    """Draws the width and the height of an image."""
    if kind in UNIFORM_SIZES:
        width, height = (int(rng.integers(*limits)) for limits in UNIFORM_SIZES[kind])
        return width, height
    if kind == "web":
        side = float(np.exp(rng.uniform(np.log(400), np.log(2000))))
        size, upright = (int(side), int(side * rng.uniform(0.5, 1))), 0.4
    else:
        sizes, shares, upright = COMMON_SIZES[kind]
        size = sizes[int(rng.choice(len(sizes), p=shares))]
    return size[::-1] if rng.random() < upright else size


def captions(count: int, seed: int = 0) -> list[int]:
    """Draws the numbers of tokens of phase 1's captions, each with the newline before it."""
    return (_lengths(*CAPTION, count, np.random.default_rng(seed)) + 1).tolist()
