r"""Reading of a file of one's own: questions with answers, or conversations in the formats that training reads.

A record is one of two, and a file may hold both:

    {"id": "7", "image": "a.jpg", "question": "Which colour?", "answers": ["red"], "category": "colour"}
    {"id": "8", "image": "b.jpg", "conversations": [{"from": "human", "value": "<image>\nWhich colour?"},
                                                    {"from": "gpt", "value": "blue"}]}

Each turn of the human in a conversation is a question, with the turns before it as its context, and the reply that
follows is its answer. A field that cannot be honoured is refused with the name of the file and the number of its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vr_jax.data.llava_json import MESSAGE_KEYS, record_ranges
from vr_jax.data.records import ImageFolder, conversation_of, images_of, require_file
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text, place_images
from vr_jax.data.types import IMAGE_PLACEHOLDER, Conversation, Skip, Turn
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks.published import letter
from vr_jax.evaluation.interface import Item
from vr_jax.evaluation.metrics.named import METRICS, Metric
from vr_jax.evaluation.tables import parquet_records
from vr_jax.storage import Path, for_library, parse_json

FIELDS = ("id", "image", "images", "question", "answer", "answers", "choices", "category")
# The fields of a question that a conversation says in its messages.
_IN_MESSAGES = ("question", "answer", "answers", "choices")
_SUFFIXES = (".json", ".jsonl", ".parquet")
_LETTERS = 26
_ALL = "all"  # the category of questions without one


@dataclass(frozen=True)
class _Record:
    """A raw record.

    Attributes:
        where: Its place in the file, for messages.
        number: Its number.
        name: The id of a record without one.
        values: Its fields.
    """

    where: str
    number: int
    name: str
    values: Mapping[str, Any]


def read_items(path: Path, images: Path | None, metric: Metric, *, follow_links: bool = False) -> list[Item]:
    """Reads the questions of a file.

    Args:
        path: The file.
        images: The folder that image names are relative to. None is the folder of a JSON file; a parquet file then
            contains its images.
        metric: The metric, which says what answers are expected.
        follow_links: Whether symbolic links inside the image folder may lead out of it.

    Returns:
        The questions in the order of the file. They are labelled if all of them have answers, and unlabelled if none
        has.

    Raises:
        UserError: The file cannot be read or has no question, a field cannot be honoured, some questions have answers
            and others have none, or none of the image files exists.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file of questions, found a folder; give one of its files")
    require_file(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: expected the name of a {', '.join(_SUFFIXES)} file of questions")
    packed = path.suffix.lower() == ".parquet"
    folder = ImageFolder(images if packed else images or path.parent, follow_links=follow_links)
    found: list[tuple[_Record, Item]] = []
    for record in _parquet(path) if packed else _json(path):
        try:
            found += [(record, item) for item in _items(record, folder, metric)]
        except SkipRecord as error:
            raise UserError(f"{record.where}: {error.detail}") from None
    if not found:
        raise UserError(f"{path}: there is no question; expected one record per line, or a list of records")
    items = _labelled(path, found)
    _require_images(items, folder)
    return items


def _json(path: Path) -> Iterator[_Record]:
    """Yields the records of a JSON list, or of a file with one record per line."""
    ranges = record_ranges(path, {*MESSAGE_KEYS, "question"})
    data = path.read_bytes()
    line, before = 1, 0
    for number, (begin, end) in enumerate(ranges.tolist()):
        line, before = line + data.count(b"\n", before, begin), begin
        where = f"{path}, line {line}"
        try:
            values = parse_json(data[begin:end])
        except ValueError as error:
            raise UserError(f"{where}: the record cannot be read: {error}") from None
        yield _Record(where, number, f"{path.name}#{number}", _object(values, where))


def _parquet(path: Path) -> Iterator[_Record]:
    """Yields the rows of a parquet file."""
    for number, values in enumerate(parquet_records(path, (), _columns(path))):
        where = f"{path}, row {number}"
        if isinstance(values, str):
            raise UserError(f"{where}: {values}")
        yield _Record(where, number, f"{path.name}#{number}", _object(values, where))


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(for_library(path)).names
    except (pa.ArrowException, OSError):
        return []  # `parquet_records` opens the file again and says what is wrong with it.


def _object(values: Any, where: str) -> dict[str, Any]:
    """Returns the fields of a record that have a value; a null is as good as an absent field."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a record, found a {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _items(record: _Record, folder: ImageFolder, metric: Metric) -> list[Item]:
    category = _text(record.values, "category", _ALL)
    if MESSAGE_KEYS & record.values.keys():
        return _of_conversation(record, folder, metric, category)
    return [_of_question(record, folder, metric, category)]


def _of_question(record: _Record, folder: ImageFolder, metric: Metric, category: str) -> Item:
    """Reads a record with a question."""
    values = record.values
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), (*FIELDS, *MESSAGE_KEYS), 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join((*FIELDS, "conversations", "messages"))
            raise UserError(f"{record.where}: unknown field {name!r}; {hint}known: {known}")
    question = check_text(values.get("question"), "The field 'question'")
    if not question.strip():
        raise UserError(f"{record.where}: the field 'question' is empty; write the question there")
    if len(place_images([question], 0)[0]) > 1:
        raise UserError(
            f"{record.where}: the field 'question' has {IMAGE_PLACEHOLDER}, which is a text there, since the images "
            "stand in front of the question; remove it, or write 'conversations' as LLaVA does"
        )
    choices = _choices(record, metric)
    answers = _answers(record, choices)
    if answers and (problem := metric.problem(answers)):
        raise UserError(f"{record.where}: {problem}")
    fields = {"choices": choices} if choices else {}
    images = images_of(values, folder)
    return Item(_id(record), question, answers, category, images, fields, labelled=bool(answers))


def _of_conversation(record: _Record, folder: ImageFolder, metric: Metric, category: str) -> list[Item]:
    """Reads a record with a conversation, each turn of whose user is a question."""
    if metric.choices:
        raise UserError(
            f"{record.where}: a conversation has no choices, which the metric {metric.name} needs; write 'question' "
            "and 'choices', or use letter"
        )
    if given := [name for name in _IN_MESSAGES if name in record.values]:
        raise UserError(
            f"{record.where}: the field {given[0]!r} stands beside a conversation, whose messages are the questions "
            "and the answers; remove one of them"
        )
    found = conversation_of(record.values, record.name, folder)
    if isinstance(found, Skip):
        raise UserError(f"{record.where}: {found.detail}")
    places = sum(turn.images for turn in found.turns)
    if places != len(found.images):
        raise UserError(
            f"{record.where}: the record has {len(found.images)} image(s), but its messages have {places} place(s) for "
            f"images, which LLaVA's format writes as {IMAGE_PLACEHOLDER}; the numbers must be equal"
        )
    asking = [number for number, turn in enumerate(found.turns) if turn.role == "user"]
    if not asking:
        raise UserError(f"{record.where}: no message is the user's, so that there is no question")
    return [_turn_item(record, found, turn, len(asking) > 1, metric, category) for turn in asking]


def _turn_item(
    record: _Record, conversation: Conversation, number: int, several: bool, metric: Metric, category: str
) -> Item:
    """Returns the question that a turn of a conversation asks."""
    turns = conversation.turns[: number + 1]
    images = conversation.images[: sum(turn.images for turn in turns)]
    question = "".join(part for part in turns[-1].parts if isinstance(part, str)).strip()
    answers: tuple[str, ...] = ()
    if number + 1 < len(conversation.turns):
        answers = (_reference(conversation.turns[number + 1], record.where),)
        if problem := metric.problem(answers):
            raise UserError(f"{record.where}: {problem}")
    item_id = f"{conversation.id}#{number}" if several else conversation.id
    return Item(item_id, question, answers, category, images, labelled=bool(answers), turns=turns)


def _reference(turn: Turn, where: str) -> str:
    text = turn.text.strip()
    if not text:
        raise UserError(f"{where}: a reply is empty, so that its question has no answer; write it, or remove the turn")
    return text


def _id(record: _Record) -> str:
    value = record.values.get("id", record.name)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise UserError(f"{record.where}: id = {value!r}: expected a text or a whole number")
    return check_text(str(value), "The field 'id'")


def _text(values: Mapping[str, Any], name: str, default: str) -> str:
    text = check_text(values.get(name, default), f"The field {name!r}")
    if not text.strip():
        raise SkipRecord("malformed_record", f"The field {name!r} is empty; leave it out, or write a text.")
    return text


def _choices(record: _Record, metric: Metric) -> tuple[str, ...]:
    """Reads the choices of a question, which some metrics need and others have no use for."""
    where, value = record.where, record.values.get("choices")
    if value is None:
        if metric.choices:
            raise UserError(
                f"{where}: the metric {metric.name} needs the field 'choices'; add it, or use one of the metrics "
                f"{', '.join(name for name, one in METRICS.items() if not one.choices)}"
            )
        return ()
    if not metric.choices:
        using = " or ".join(name for name, one in METRICS.items() if one.choices)
        raise UserError(f"{where}: the field 'choices' has no effect with the metric {metric.name}; use {using}")
    if not isinstance(value, list) or not 2 <= len(value) <= _LETTERS:
        raise UserError(f"{where}: choices = {str(value)[:80]}: expected a list of 2 to {_LETTERS} texts")
    choices = tuple(_reference_text(one, "choices", where) for one in value)
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: the field 'choices' has the same text twice; keep one of them")
    return choices


def _answers(record: _Record, choices: Sequence[str]) -> tuple[str, ...]:
    """Reads the answers of a question; of one with choices, their letters. Without any, there are none."""
    where, values = record.where, record.values
    if "answer" in values and "answers" in values:
        raise UserError(f"{where}: it has both 'answer' and 'answers'; keep one of them")
    if "answers" in values:
        given = values["answers"]
        if not isinstance(given, list) or not given:
            raise UserError(f"{where}: answers = {str(given)[:80]}: expected a list with at least one answer")
    else:
        given = [values["answer"]] if "answer" in values else []
    name = "answers" if "answers" in values else "answer"
    if choices:
        return tuple(_letter(one, choices, name, where) for one in given)
    return tuple(_reference_text(one, name, where) for one in given)


def _reference_text(value: Any, name: str, where: str) -> str:
    """Returns an answer or a choice as a text without white space at its ends."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the field {name!r} has {str(value)[:80]}: expected a text or a whole number; write it as a text "
            "in the form that a reply should have"
        )
    text = check_text(value, f"The field {name!r}").strip()
    if not text:
        raise UserError(f"{where}: the field {name!r} has an empty text; leave the field out where there is no answer")
    return text


def _letter(value: Any, choices: Sequence[str], name: str, where: str) -> str:
    """Returns the letter of the right choice, given its number from 0 on, its letter or its text."""
    letters = [letter(number) for number in range(len(choices))]
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            return letters[value]
        raise UserError(f"{where}: {name} = {value}: expected the number of a choice, 0 to {len(choices) - 1}")
    text = _reference_text(value, name, where)
    meant = {letters[choices.index(text)]} if text in choices else set()
    meant |= {text.upper()} & set(letters)
    if len(meant) == 1:
        return meant.pop()
    if meant:
        raise UserError(
            f"{where}: {name} = {text!r} is the letter of one choice and the text of another; give the number of the "
            "choice, from 0 on"
        )
    raise UserError(
        f"{where}: {name} = {text!r}: expected the letter of a choice ({letters[0]} to {letters[-1]}), its text, or "
        "its number from 0 on"
    )


def _labelled(path: Path, found: Sequence[tuple[_Record, Item]]) -> list[Item]:
    """Returns the questions with ids that differ, after checking that all of them have answers or none has."""
    without = [record.where for record, item in found if not item.labelled]
    if without and len(without) < len(found):
        raise UserError(
            f"{path}: {len(without)} of {len(found)} questions have no answer, the first one in "
            f"{without[0].removeprefix(f'{path}, ')}; give all of them answers, or none, which writes the replies only"
        )
    first: dict[str, str] = {}
    items = []
    for record, item in found:
        if item.id in first and item.turns:
            # In LLaVA's data the id often names the image, so that several conversations have it.
            item = replace(item, id=f"{item.id}@{record.number}")
        if item.id in first:
            raise UserError(
                f"{record.where}: id = {item.id!r} is that of another question, {first[item.id]}, too; make the ids "
                "differ, or leave them out"
            )
        first[item.id] = record.where.removeprefix(f"{path}, ")
        items.append(item)
    return items


def _require_images(items: Sequence[Item], folder: ImageFolder) -> None:
    """Raises UserError if not a single image file exists. A file that some questions lack costs these questions."""
    paths = [image for item in items for image in item.images if isinstance(image, Path)]
    if paths and not any(path.is_file() for path in dict.fromkeys(paths)):
        raise UserError(
            f"{paths[0]} does not exist, and neither does any other image file in {folder.path}; set images "
            "(--images) to the folder that the image names belong to"
        )
