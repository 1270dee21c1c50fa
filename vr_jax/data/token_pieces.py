"""Tokens as readable text, piece by piece, for pages that show what a model reads and what it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int

from vr_jax.model.batch import NO_CELL

CHARACTERS = 4000  # of a sample that are shown
Kind = Literal["text", "target", "pooled", "vision"]
_KINDS: tuple[Kind, ...] = ("text", "target", "pooled", "vision")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind.

    Attributes:
        kind: "target" if the loss counts them, "vision" for vision tokens, "pooled" if the text-guided token may pool
            them, and "text" otherwise.
        text: The decoded tokens, or the number of vision tokens.
    """

    kind: Kind
    text: str


class Tokens(Protocol):
    """The tokens of one sample with their masks: an `Example`, or a part of a row of a batch."""

    @property
    def tokens(self) -> Int[np.ndarray, " n"]:
        """Token ids."""

    @property
    def loss_mask(self) -> Bool[np.ndarray, " n"]:
        """True where the token is a target of the loss."""

    @property
    def text_token_mask(self) -> Bool[np.ndarray, " n"]:
        """True where the text-guided token may pool the token."""

    @property
    def vision_cell(self) -> Int[np.ndarray, " n"]:
        """The cell of a vision token; `NO_CELL` for text."""


def pieces_of(sample: Tokens, tokenizer: Any) -> list[Piece]:
    """Decodes the tokens of a sample, piece by piece, as far as a page shows them.

    Args:
        sample: The tokens and their masks.
        tokenizer: A Hugging Face tokenizer.
    """
    vision = sample.vision_cell != NO_CELL
    kinds = np.where(vision, 3, np.where(sample.loss_mask, 1, np.where(sample.text_token_mask, 2, 0)))
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    pieces = []
    for begin, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        kind = _KINDS[kinds[begin]]
        tokens = sample.tokens[begin:end].tolist()
        text = f"[{len(tokens)} vision tokens]" if kind == "vision" else tokenizer.decode(tokens)
        pieces.append(Piece(kind, text))
    return shortened(pieces)


def shortened(pieces: list[Piece]) -> list[Piece]:
    """Returns the pieces up to the number of characters that a page shows of a sample."""
    kept: list[Piece] = []
    left = CHARACTERS
    for piece in pieces:
        if len(piece.text) > left:
            return [*kept, Piece(piece.kind, piece.text[:left]), Piece("text", " ... (the rest is not shown)")]
        kept.append(piece)
        left -= len(piece.text)
    return kept
