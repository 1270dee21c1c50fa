"""A conversation with a model about images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence

from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.errors import UserError
from vr_jax.inference.generator import Generator
from vr_jax.inference.prompts import user_turn
from vr_jax.inference.sampling import Sampling
from vr_jax.inference.streaming import Piece
from vr_jax.storage import Path, as_path

Source = str | os.PathLike[str] | bytes  # the path of an image's file, or its contents


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
        prompt: The prompt of the last question, also while its answer is generated; None before the first question.
    """

    def __init__(
        self,
        generator: Generator,
        processor: Processor,
        images: Sequence[Source] = (),
        *,
        system: str | None = None,
    ):
        """Starts a conversation and reads its first images.

        Args:
            generator: Generates the answers.
            processor: Turns conversations into prompts for the generator's model.
            images: The images of the first question.
            system: The system message; None is that of the template.

        Raises:
            UserError: An image cannot be used.
        """
        self.use(generator, processor)
        self.system = system
        self.reset()
        self.add_images(images)

    def use(self, generator: Generator, processor: Processor) -> None:
        """Goes on with another model, or with the same one loaded in another way; the conversation stays.

        Args:
            generator: Generates the answers.
            processor: Turns conversations into prompts for the generator's model.
        """
        self.generator = generator
        self.processor = dataclasses.replace(processor, rotate=True)

    def reset(self) -> None:
        """Forgets the questions, the answers and the images. The system message stays."""
        self.turns: tuple[Turn, ...] = () if self.system is None else (Turn("system", self.system),)
        self.images: tuple[Path | bytes, ...] = ()
        self.pending: tuple[Path | bytes, ...] = ()
        self.prompt: Example | None = None

    def add_images(self, images: Sequence[Source]) -> None:
        """Adds images to the next question. They are read at once, so that a wrong path is reported early.

        Args:
            images: The paths of the images' files, or their contents.

        Raises:
            UserError: An image cannot be used; the conversation stays as it was.
        """
        added = (one if isinstance(one, bytes) else as_path(one, "the image") for one in images)
        pending = (*self.pending, *added)
        self._prompt((*self.turns, self._turn("", len(pending))), (*self.images, *pending))
        self.pending = pending

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Asks a question and yields the texts of `pieces` that are not empty.

        The arguments and errors are those of `pieces`.
        """
        for piece in self.pieces(question, max_new_tokens, sampling):
            if piece.text:
                yield piece.text

    def pieces(self, question: str, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
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
        texts = []
        self.prompt = self._prompt(turns, images)
        for piece in self.generator.pieces(self.prompt, max_new_tokens=max_new_tokens, sampling=sampling):
            texts.append(piece.text)
            yield piece
        self.turns = (*turns, Turn("assistant", "".join(texts)))
        self.images, self.pending = images, ()

    def _turn(self, question: str, images: int) -> Turn:
        return user_turn(question, images, self.processor.encoder.separators)

    def _prompt(self, turns: tuple[Turn, ...], images: tuple[Path | bytes, ...]) -> Example:
        try:
            return self.processor.prompt(Conversation("chat", turns, images))
        except SkipRecord as error:
            raise UserError(error.detail) from error
