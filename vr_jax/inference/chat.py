"""A conversation with a model about images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.errors import UserError
from vr_jax.inference.generator import Generator
from vr_jax.inference.prompts import user_turn
from vr_jax.inference.sampling import Sampling
from vr_jax.storage import local_path


class Chat:
    """A conversation about images. An image belongs to the question that follows it.

    The whole conversation is prefilled at every turn. A text-guided token may pool later questions too, so what Vision
    Remember did to the vision tokens of one turn cannot be kept for the next one. Photographs are turned as their EXIF
    orientation says, as transformers' `load_image` does.

    Attributes:
        generator: Generates the answers.
        processor: Turns conversations into prompts for the generator's model.
        system: The system message, or None for that of the template.
        turns: The questions and answers so far.
        images: The images of these questions.
        pending: The images of the next question.
    """

    def __init__(
        self,
        generator: Generator,
        processor: Processor,
        images: Sequence[str | os.PathLike[str]] = (),
        *,
        system: str | None = None,
    ):
        """Starts a conversation and reads its first images.

        Args:
            generator: Generates the answers.
            processor: Turns conversations into prompts for the generator's model.
            images: The files of the images of the first question.
            system: The system message; None is that of the template.

        Raises:
            UserError: An image cannot be used.
        """
        self.generator = generator
        self.processor = dataclasses.replace(processor, rotate=True)
        self.system = system
        self.reset()
        self.add_images(images)

    def reset(self) -> None:
        """Forgets the questions, the answers and the images. The system message stays."""
        self.turns: tuple[Turn, ...] = () if self.system is None else (Turn("system", self.system),)
        self.images: tuple[Path, ...] = ()
        self.pending: tuple[Path, ...] = ()

    def add_images(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Adds images to the next question. They are read at once, so that a wrong path is reported early.

        Args:
            paths: The files of the images.

        Raises:
            UserError: An image cannot be used; the conversation stays as it was.
        """
        pending = (*self.pending, *(local_path(path, "the image") for path in paths))
        self._prompt((*self.turns, self._turn("", len(pending))), (*self.images, *pending))
        self.pending = pending

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Asks a question and yields the pieces of the answer as they are decoded.

        The question and its answer join the conversation once the answer was read to its end. A question that fails
        leaves the conversation as it was.

        Args:
            question: The text of the question. The new images stand in front of it, and `<image>` in it is text.
            max_new_tokens: The longest answer, in tokens.
            sampling: How the next token is chosen.

        Raises:
            UserError: The conversation became too long.
        """
        turns = (*self.turns, self._turn(question, len(self.pending)))
        images = (*self.images, *self.pending)
        pieces = []
        prompt = self._prompt(turns, images)
        for piece in self.generator.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling):
            pieces.append(piece)
            yield piece
        self.turns = (*turns, Turn("assistant", "".join(pieces)))
        self.images, self.pending = images, ()

    def _turn(self, question: str, images: int) -> Turn:
        return user_turn(question, images, self.processor.encoder.separators)

    def _prompt(self, turns: tuple[Turn, ...], images: tuple[Path, ...]) -> Example:
        try:
            return self.processor.prompt(Conversation("chat", turns, images))
        except SkipRecord as error:
            raise UserError(error.detail) from error
