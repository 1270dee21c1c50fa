"""A conversation with a model about images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.errors import UserError
from vr_jax.inference.generator import Generator
from vr_jax.inference.prompts import user_turn
from vr_jax.inference.sampling import Sampling


class Chat:
    """A conversation about images, which belong to the first question.

    The whole conversation is prefilled at every turn. A text-guided token may pool later questions too, so what Vision
    Remember did to the vision tokens of one turn cannot be kept for the next one.
    """

    def __init__(self, generator: Generator, processor: Processor, images: Sequence[Path] = ()):
        """Starts a conversation and reads its images.

        Args:
            generator: Generates the answers.
            processor: Turns conversations into prompts for the generator's model.
            images: The files of the images.

        Raises:
            UserError: An image cannot be used.
        """
        self.generator = generator
        self.processor = processor
        self.images = tuple(images)
        self.turns: tuple[Turn, ...] = ()
        # The images are read now, so that a wrong path is reported before the first question.
        self._prompt((user_turn("", len(images)),))

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Asks a question and yields the pieces of the answer as they are decoded.

        The question and its answer join the conversation once the answer was read to its end. A question that fails
        leaves the conversation as it was.

        Args:
            question: The text of the question. Image placeholders in it must match the images.
            max_new_tokens: The longest answer, in tokens.
            sampling: How the next token is chosen.

        Raises:
            UserError: The placeholders do not match the images, or the conversation became too long.
        """
        turns = (*self.turns, user_turn(question, 0 if self.turns else len(self.images)))
        pieces = []
        for piece in self.generator.stream(self._prompt(turns), max_new_tokens=max_new_tokens, sampling=sampling):
            pieces.append(piece)
            yield piece
        self.turns = (*turns, Turn("assistant", "".join(pieces)))

    def _prompt(self, turns: tuple[Turn, ...]) -> Example:
        try:
            return self.processor.prompt(Conversation("chat", turns, self.images))
        except SkipRecord as error:
            raise UserError(error.detail) from error
