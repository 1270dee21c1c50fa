"""Builds the conversation of a question and its images, which a `Processor` turns into a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from vr_jax.data.prompts.segments import LLAVA_SEPARATORS
from vr_jax.data.types import IMAGE, Conversation, Part, Turn
from vr_jax.errors import UserError
from vr_jax.storage import Path, as_path


class PromptError(UserError):
    """A question has places for images, but not one for each. Evaluation counts such a question and goes on."""


def question(
    content: str | Sequence[Part],
    images: Sequence[str | Path | bytes] = (),
    separators: tuple[str, str] = LLAVA_SEPARATORS,
) -> Conversation:
    """Makes a conversation that asks one question about images.

    Args:
        content: The question; see `user_turn`.
        images: Paths of the image files, or their contents.
        separators: See `user_turn`.

    Raises:
        PromptError: The question has places for images, but not one for each image.
    """
    files = tuple(image if isinstance(image, bytes) else as_path(image) for image in images)
    return Conversation("question", (user_turn(content, len(files), separators),), files)


def user_turn(content: str | Sequence[Part], images: int, separators: tuple[str, str] = LLAVA_SEPARATORS) -> Turn:
    """Makes the turn that asks a question about a number of images.

    Images without a place in the question stand in front of it. For a model of LLaVA's they are joined by one space and
    followed by a newline (source: lmms-eval's `llava.py`).

    Args:
        content: The question as text, in which `<image>` is text like any other, or as texts and `IMAGE`, where each
            image belongs.
        images: The number of images.
        separators: What stands between the images, and behind the last one: `ChatEncoder.separators` of the model.

    Raises:
        PromptError: The question has places for images, but not one for each image.
    """
    between, behind = separators
    turn = Turn("user", content) if isinstance(content, str) else Turn("user", *content)
    if turn.images == 0 and images > 0:
        first = [part for _ in range(images) for part in (IMAGE, between)]
        return Turn("user", *first[:-1], behind, *turn.parts)
    if turn.images != images:
        raise PromptError(
            f"the question has places for {turn.images} image(s), but {images} image(s) are given; give as many images "
            "as places, or a question without places"
        )
    return turn
