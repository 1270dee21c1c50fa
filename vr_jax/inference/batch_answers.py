"""Answers a JSON Lines file of questions and images in batches."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from vr_jax.data.image_values import image_of
from vr_jax.data.messages import turns_and_images
from vr_jax.data.processor import Processor
from vr_jax.data.prompts.segments import LLAVA_SEPARATORS
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.errors import UserError
from vr_jax.inference.buckets import PromptTooLong
from vr_jax.inference.generator import Generator
from vr_jax.inference.prompts import PromptError, user_turn
from vr_jax.inference.sampling import Sampling
from vr_jax.inference.state import Reply
from vr_jax.sharding import batch_shards
from vr_jax.storage import Path, PathLike, as_path, atomic_write, file_errors, parse_json

FIELDS = ("id", "question", "turns", "image", "images", "messages")
_WINDOW = 8  # batches that are prepared together, so that prompts of one length meet
_THREADS = 16


@dataclass(frozen=True)
class Question:
    """A line of the input.

    Attributes:
        id: The record's id, or its line number where it has none.
        conversation: The turns and the images, or the reason why the record cannot be asked.
    """

    id: str | int
    conversation: Conversation | str


@dataclass(frozen=True)
class Summary:
    """Counts the answers and the errors that were written.

    Attributes:
        answers: The number of records with an answer.
        errors: How many records have no answer, by reason.
    """

    answers: int
    errors: Counter[str]


def answer_file(
    generator: Generator,
    processor: Processor,
    source: PathLike,
    target: PathLike,
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Summary:
    """Answers the questions of a JSON Lines file and writes another one, a line for each question in their order.

    An output line holds the id, and either "answer", "finish" ("stop" or "length") and "tokens" (their number), or
    "error" with the reason why the question could not be asked. The file appears when it is complete.

    Args:
        generator: Generates the answers.
        processor: Turns conversations into prompts of the generator's model.
        source: The questions; see `read_questions`.
        target: The file to write.
        batch_size: The number of prompts in a batch, rounded up to a multiple of the mesh's data shards.
        max_new_tokens: The longest answer, in tokens.
        sampling: How the next token is chosen; by default greedily. The draws for a question depend on the seed and on
            the question's place in the file alone.
        on_batch: Called with the number of questions of each batch once it is answered.

    Raises:
        UserError: A line of the source is malformed, or a file cannot be read or written.
    """
    questions = read_questions(source, processor.encoder.separators)
    errors: Counter[str] = Counter()
    with atomic_write(target) as temporary, temporary.open("wb") as file:
        for question, answer in answers(
            generator,
            processor,
            questions,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            on_batch=on_batch,
        ):
            record: dict[str, Any] = {"id": question.id}
            if isinstance(answer, Reply):
                record |= {"answer": answer.text, "finish": answer.finish, "tokens": len(answer.tokens)}
            else:
                record["error"] = answer
                errors[answer.partition(":")[0]] += 1
            # Half a surrogate pair, which an id may have and UTF-8 has not, becomes the escape that JSON has for it.
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    return Summary(len(questions) - errors.total(), errors)


def answers(
    generator: Generator,
    processor: Processor,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[Question, Reply | str]]:
    """Yields each question, in their order, with its answer or with the reason why it could not be asked.

    Args:
        generator: Generates the answers.
        processor: Turns conversations into prompts of the generator's model.
        questions: The questions.
        batch_size: The number of prompts in a batch, rounded up to a multiple of the mesh's data shards.
        max_new_tokens: The longest answer, in tokens.
        sampling: How the next token is chosen; by default greedily.
        on_batch: Called with the number of questions of each batch once it is answered.
    """
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    rows = -(-batch_size // shards) * shards
    window = rows * _WINDOW

    def prepare(question: Question) -> Example | str:
        return _prompt(generator, processor, question)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(questions), window):
            part = questions[start : start + window]
            prompts = dict(enumerate(pool.map(prepare, part), start=start))
            # Prompts of about one length share a batch, so that little of it is padding.
            ready = {number: prompt for number, prompt in prompts.items() if not isinstance(prompt, str)}
            order = sorted(ready, key=lambda number: (-len(ready[number].tile_pixels), -len(ready[number].tokens)))
            replies: dict[int, Reply] = {}
            for first in range(0, len(order), rows):
                batch = {number: ready[number] for number in order[first : first + rows]}
                replies |= generator.generate_rows(batch, max_new_tokens=max_new_tokens, rows=rows, sampling=sampling)
                if on_batch is not None:
                    on_batch(len(batch))
            if on_batch is not None and len(ready) < len(part):
                on_batch(len(part) - len(ready))
            for number, question in enumerate(part, start=start):
                prompt = prompts[number]
                yield question, prompt if isinstance(prompt, str) else replies[number]


def read_questions(path: PathLike, separators: tuple[str, str] = LLAVA_SEPARATORS) -> list[Question]:
    """Reads a JSON Lines file of questions.

    A line is an object with "question", or "turns" ({"role": "user" or "assistant", "text": ...}, ending with the
    user's), or "messages" as in `vr_jax.data.schema.Record`, whose parts can place the images. It may have "id", and
    "image" or "images": paths relative to the folder of the file, data URIs or base64. Images without a place stand in
    front of the user's first turn. A question that reads `<image>` is text. Empty lines are ignored, and a null means
    the same as an absent key.

    Args:
        path: The file.
        separators: What stands between images without a place, and behind the last one: `ChatEncoder.separators` of the
            model.

    Raises:
        UserError: The file cannot be read, has no question, or has a malformed line; the message names file and line.
    """
    file = as_path(path)
    with file_errors(f"{file} cannot be read"):
        lines = file.read_bytes().split(b"\n")
    questions: list[Question] = []
    lines_of: dict[str | int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        question = _question(line, number, where, file.parent, separators)
        if question.id in lines_of:
            raise UserError(f"{where}: id {question.id!r} is that of line {lines_of[question.id]} too")
        lines_of[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"{file}: no question; expected one JSON object on each line")
    return questions


def _question(line: bytes, number: int, where: str, folder: Path, separators: tuple[str, str]) -> Question:
    try:
        record = parse_json(line)
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with the fields {', '.join(FIELDS)}")
    record = {name: value for name, value in record.items() if value is not None}  # null is as good as absent
    for name in record:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{where}: unknown field {name!r}; {hint}known: {', '.join(FIELDS)}")
    record_id = record.get("id", number)
    if not isinstance(record_id, str | int) or isinstance(record_id, bool):
        raise UserError(f"{where}: id = {record_id!r}: expected a text or an integer")
    images = _images(record, where)
    if record.get("messages") is not None:
        turns, files = _messages(record, images, where, folder)
    else:
        turns, files = _turns(record, where), _image_files(images, where, folder)
    try:
        if not any(turn.images for turn in turns):
            first = next(k for k, turn in enumerate(turns) if turn.role == "user")
            asked = user_turn(turns[first].parts, len(files), separators)
            turns = (*turns[:first], asked, *turns[first + 1 :])
        return Question(record_id, Conversation(str(record_id), turns, files))
    except PromptError as error:
        return Question(record_id, f"image_count: {error}")


def _images(record: dict[str, Any], where: str) -> list[str]:
    if "image" in record and "images" in record:
        raise UserError(f"{where}: it has both 'image' and 'images'; give one of them")
    images = record.get("images", [record["image"]] if "image" in record else [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'image' is a path and 'images' a list of paths, found {images!r}")
    return images


def _image_files(images: list[str], where: str, folder: Path) -> tuple[Path | bytes, ...]:
    """The paths that the names of images stand for, or the images themselves where the texts contain them."""
    try:
        return tuple(image_of(image, "image", lambda name: folder / check_text(name, "An image")) for image in images)
    except SkipRecord as error:
        raise UserError(f"{where}: {error.detail}") from None


def _messages(
    record: dict[str, Any], images: list[str], where: str, folder: Path
) -> tuple[tuple[Turn, ...], tuple[Path | bytes, ...]]:
    """The turns and images of a conversation that is written as OpenAI and transformers do."""
    if "question" in record or "turns" in record:
        raise UserError(f"{where}: it has 'messages' beside 'question' or 'turns'; give one of them")
    try:
        turns, files = turns_and_images(
            record["messages"], "messages", images, "images", lambda name: folder / check_text(name, "An image")
        )
    except SkipRecord as error:
        raise UserError(f"{where}: {error.detail}") from None
    if turns[-1].role != "user":
        raise UserError(f"{where}: the last of 'messages' is the {turns[-1].role}'s, but must be the user's")
    return turns, files


def _turns(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if ("question" in record) == ("turns" in record):
        raise UserError(f"{where}: expected one of 'question' and 'turns', or 'messages'")
    if "question" in record:
        if not isinstance(record["question"], str):
            raise UserError(f"{where}: question = {record['question']!r}: expected a text")
        return (Turn("user", record["question"]),)
    turns = record["turns"]
    expected = '\'turns\' is a list of {"role": ..., "text": ...} whose roles are user, assistant, ..., user'
    if not isinstance(turns, list) or len(turns) % 2 == 0:
        raise UserError(f"{where}: {expected}")
    for index, turn in enumerate(turns):
        role = ("user", "assistant")[index % 2]
        if not isinstance(turn, dict) or turn.get("role") != role or not isinstance(turn.get("text"), str):
            raise UserError(f"{where}: turn {index + 1}: {expected}")
        if others := [name for name, value in turn.items() if name not in ("role", "text") and value is not None]:
            raise UserError(
                f"{where}: turn {index + 1}: unknown field {others[0]!r}; {expected}. Images are in 'image' or "
                "'images' of the record, or in the parts of 'messages'"
            )
    return tuple(Turn(turn["role"], turn["text"]) for turn in turns)


def _prompt(generator: Generator, processor: Processor, question: Question) -> Example | str:
    """The prompt of a question, or the reason why it cannot be asked."""
    if isinstance(question.conversation, str):
        return question.conversation
    try:
        prompt = processor.prompt(question.conversation)
        generator.buckets.fit(len(prompt.tokens), len(prompt.tile_pixels))
    except SkipRecord as error:
        return str(error)
    except PromptTooLong as error:
        return f"too_long: {error}"
    return prompt
