"""A conversation with one or two models: a question becomes streams of answers, numbers and heat maps."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np

from vr_jax.app.contract import Answer, Settings, Stats, Upload
from vr_jax.app.figure import Figure, figures
from vr_jax.app.models import Models, ModelThread
from vr_jax.evaluation import rereads
from vr_jax.failures import as_user_error
from vr_jax.inference import Chat, Generator
from vr_jax.model.batch import NO_CELL
from vr_jax.model.reread import reread_refusal

FAULT = "the program failed; the terminal that runs this page shows how"
WAITING = "waiting for the model"
READING = "reading the images and the question"
DRAWING = "computing the heat maps"

logger = logging.getLogger("vr_jax.app")


class Session:
    """What one visitor and the models have said. Each model sees its own answers alone.

    Attributes:
        thread: Runs the models.
        chats: The conversation with each model; None before its first answer.
    """

    def __init__(self, thread: ModelThread):
        """Begins conversations without a question.

        Args:
            thread: Runs the models.
        """
        self.thread = thread
        self.chats: list[Chat | None] = [None] * thread.count

    def ask(self, question: str, images: Sequence[Upload], settings: Settings) -> Iterator[tuple[int, Answer]]:
        """Asks every model, one after another.

        A question that a model cannot be asked leaves the conversation with it as it was, and so does an answer that
        nobody reads to its end. The other model answers nevertheless.

        Args:
            question: The text of the question.
            images: The images that belong to it.
            settings: What the user chose.

        Yields:
            The number of a model, and what is known of its answer.
        """
        for number in range(self.thread.count):
            answer = Answer(note=WAITING)
            yield number, answer

            def job(models: Models, number: int = number) -> Iterator[tuple[Answer, Chat | None]]:
                return _answers(models, number, self.chats[number], question, images, settings)

            try:
                for answer, after in self.thread.run(job):
                    if after is not None:
                        self.chats[number] = after
                    yield number, answer
            except Exception as error:
                yield number, dataclasses.replace(answer, note="", problem=problem_line(error), done=True)


def _answers(
    models: Models,
    number: int,
    before: Chat | None,
    question: str,
    images: Sequence[Upload],
    settings: Settings,
) -> Iterator[tuple[Answer, Chat | None]]:
    """Asks one model; it runs in the thread of the models.

    Yields:
        What is known of the answer, and the conversation that it has joined once it is whole. The conversation before
        it stays as it was, because the thread may be ahead of a reader who stops.
    """
    with models.use(number, settings.variants[number]) as (generator, processor):
        yield Answer(note=READING), None
        begin, compiled = time.perf_counter(), generator.compilations.total()
        chat = Chat(generator, processor) if before is None else copy.copy(before)
        chat.use(generator, processor)
        chat.add_images([one.data for one in images])
        answer, first = Answer(), None
        for piece in chat.pieces(question, settings.max_new_tokens, settings.sampling):
            now = time.perf_counter()
            first = first or now
            stats = Stats(
                *prompt_sizes(chat),
                tokens=piece.tokens,
                first_token=first - begin,
                rest=now - first,
                compiled=generator.compilations.total() > compiled,
                finish=piece.finish,
            )
            answer = Answer(answer.text + piece.text, stats)
            yield answer, None
        answer = dataclasses.replace(answer, whole=True)
        if (refusal := maps_refusal(generator, chat, settings)) is not None:
            yield dataclasses.replace(answer, note=refusal, done=True), chat
            return
        yield dataclasses.replace(answer, note=DRAWING), chat
        yield dataclasses.replace(answer, figures=draw(generator, chat, settings), done=True), chat


def prompt_sizes(chat: Chat) -> tuple[int, int]:
    """Returns the tokens of a conversation's last prompt, and how many of them are vision tokens."""
    assert chat.prompt is not None
    return len(chat.prompt.tokens), int(np.count_nonzero(chat.prompt.vision_cell != NO_CELL))


def maps_refusal(generator: Generator, chat: Chat, settings: Settings) -> str | None:
    """Returns why there are no heat maps for an answer, which is nothing where they are switched off, or None."""
    if not settings.maps:
        return ""
    if not chat.images:
        return "no heat maps: the conversation has no image"
    refusal = reread_refusal(generator.model.config)
    return None if refusal is None else f"no heat maps: {refusal}"


def draw(generator: Generator, chat: Chat, settings: Settings) -> tuple[Figure, ...]:
    """Computes the heat maps over the images of a conversation for its last question."""
    assert chat.prompt is not None
    found = rereads(generator, {0: chat.prompt}, 1)[0]
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in chat.images]
    return figures(found, images, generator.model.config, overview=settings.overview)


def problem_line(error: Exception) -> str:
    """Returns the one line that the page shows for an error. The log gets the traceback of a fault of the program."""
    found = as_user_error(error)
    if found is None:
        logger.error("the page could not answer", exc_info=error)
        return FAULT
    return " ".join(str(found).split())
