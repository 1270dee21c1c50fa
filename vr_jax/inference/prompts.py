"""From a question and its images to a user turn."""

from __future__ import annotations

from vr_jax.data.types import IMAGE_PLACEHOLDER, Turn


class PromptError(ValueError):
    """A question that cannot be asked as it stands; one line for the user."""


def user_turn(text: str, images: int) -> Turn:
    """The turn that asks `text` about that many images.

    Without placeholders in the text they are put in front: joined by one space, then a newline (lmms-eval's LLaVA).
    Raises PromptError if the text has placeholders, but not one for each image."""
    found = text.count(IMAGE_PLACEHOLDER)
    if found == 0 and images > 0:
        return Turn("user", " ".join([IMAGE_PLACEHOLDER] * images) + "\n" + text)
    if found != images:
        raise PromptError(
            f"the question has {found} {IMAGE_PLACEHOLDER} placeholder(s) for {images} image(s); "
            "give as many images as placeholders, or no placeholder"
        )
    return Turn("user", text)
