"""Builds the conversation of a question and its images, which a `Processor` turns into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vr_jax.data.types import IMAGE_PLACEHOLDER, Conversation, Turn
from vr_jax.errors import UserError


class PromptError(UserError):
    """A question has placeholders that do not match its images. Evaluation counts such a question and goes on."""


def question(text: str, images: Sequence[str | Path | bytes] = ()) -> Conversation:
    """Makes a conversation that asks one question about images.

    Args:
        text: The question. It needs no image placeholders; see `user_turn`.
        images: Paths of the image files, or their contents.

    Raises:
        PromptError: The text has image placeholders, but not one for each image.
    """
    files = tuple(image if isinstance(image, bytes) else Path(image) for image in images)
    return Conversation("question", (user_turn(text, len(files)),), files)


def user_turn(text: str, images: int) -> Turn:
    """Makes the turn that asks a question about a number of images.

    A text without image placeholders gets them in front, joined by one space and followed by a newline.
    Source: lmms-eval's `llava.py`.

    Args:
        text: The question.
        images: The number of images.

    Raises:
        PromptError: The text has image placeholders, but not one for each image.
    """
    found = text.count(IMAGE_PLACEHOLDER)
    if found == 0 and images > 0:
        return Turn("user", " ".join([IMAGE_PLACEHOLDER] * images) + "\n" + text)
    if found != images:
        raise PromptError(
            f"the question has {found} {IMAGE_PLACEHOLDER} placeholder(s) for {images} image(s); "
            "give as many images as placeholders, or no placeholder"
        )
    return Turn("user", text)
