"""Pages as tokenised rows, from which the decoder of the comparison on pages learns to read (`reading_parts`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.accuracy.encoder import PatchReader
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder
from vr_jax.data.demo.reading import PAGE, PLACES, ReadingSample, ReadingSource, conversations, place_of
from vr_jax.data.demo.tokenizer import reading_tokenizer
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.pytree import array_dataclass

TURNS = 3
VARIANTS = 3  # Rows of a page.
PAD_ID = -1  # A token slot that is not used.


@array_dataclass
class Rows:
    """Tokenised rows without their vision tokens, on the device.

    Row r is variant r % 3 of page r // 3: questions, other questions, a caption.

    Attributes:
        before: Tokens before the image, aligned at the right.
        after: Tokens after the image.
        targets: Which of the latter are targets.
        levels: The encoder's last hidden state.
        marks: The tokens of place and answer of every highlighted patch; else 0.
    """

    before: Int[Array, "rows P"]
    after: Int[Array, "rows S"]
    targets: Bool[Array, "rows S"]
    levels: Float[Array, "count patches Dv"]
    marks: Int[Array, "count patches 2"]


def last_states(encoder: PatchReader, samples: Sequence[ReadingSample]) -> np.ndarray:
    """The encoder's last hidden state of every page, in 16 bits."""
    pixels = np.empty((len(samples), PAGE.side, PAGE.side, 3), np.uint8)
    for number, sample in enumerate(samples):
        with open_image(sample.png) as image:
            pixels[number] = decode_rgb(image)
    forward = jax.jit(lambda part: encoder.hidden_states(part)[-1].astype(encoder.cache_dtype))
    return np.concatenate([np.asarray(forward(pixels[k : k + 50])) for k in range(0, len(pixels), 50)])


def make_rows(samples: Sequence[tuple[ReadingSample, ReadingSample]], levels: np.ndarray) -> Rows:
    """Tokenises two draws of questions and the caption of every page."""
    tokenizer = reading_tokenizer()
    chat, plain = (ChatEncoder(tokenizer, name, False, "first_turn") for name in ("qwen_1_5", "plain"))
    texts = []
    for first, second in samples:
        texts += [chat.sample(conversations(one)[1].turns) for one in (first, second)]
        texts.append(plain.sample(conversations(first)[0].turns))
    places = [int(np.flatnonzero(text.tokens == IMAGE_TOKEN)[0]) for text in texts]
    left, right = max(places), max(len(text.tokens) - place - 1 for text, place in zip(texts, places, strict=True))
    before = np.full((len(texts), left), PAD_ID, np.int32)
    after = np.full((len(texts), right), PAD_ID, np.int32)
    targets = np.zeros((len(texts), right), bool)
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        before[number, left - place :] = text.tokens[:place]
        rest = text.tokens[place + 1 :]
        after[number, : len(rest)] = rest
        targets[number, : len(rest)] = text.loss_mask[place + 1 :]
    return Rows(*map(jnp.asarray, (before, after, targets, levels, _marks(samples, tokenizer))))


def _marks(samples: Sequence[tuple[ReadingSample, ReadingSample]], tokenizer: Any) -> np.ndarray:
    def only_token(text: str) -> int:
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        return token

    ids = {text: only_token(text) for text in (*PLACES, *(mark.answer for one, _ in samples for mark in one.marks))}
    marks = np.zeros((len(samples), PAGE.grid**2, 2), np.int32)
    for number, (sample, _) in enumerate(samples):
        for mark in sample.marks:
            marks[number, mark.row * PAGE.grid + mark.column] = ids[place_of(mark)], ids[mark.answer]
    return marks


def draws(source: ReadingSource) -> list[tuple[ReadingSample, ReadingSample]]:
    """Every page twice, with other questions; pages with few highlighted patches repeat their questions."""
    pairs = []
    for sample in map(source.sample, range(len(source))):
        first, others = sample.questions[:TURNS], sample.questions[TURNS:] or sample.questions[:TURNS]
        pairs.append((dataclasses.replace(sample, questions=first), dataclasses.replace(sample, questions=others)))
    return pairs
