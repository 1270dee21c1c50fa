"""JSON Lines of questions: what is read, how malformed lines are named, and that answers are those of the generator."""

from __future__ import annotations

import base64
import json

import pytest

from tests.commands import run
from tests.inference import tiny
from vr_jax.data.types import IMAGE, Turn
from vr_jax.errors import UserError
from vr_jax.inference import Generator, Sampling, answers, load_for_inference, question, read_questions

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and the questions of `RECORDS` beside their images."""
    folder = tmp_path_factory.mktemp("answers")
    tiny.save(folder / "model", vision_remember=False)
    (folder / "images").mkdir()
    (folder / "images" / "wide.png").write_bytes(tiny.png(60, 30, 1))
    (folder / "images" / "tall.png").write_bytes(tiny.png(24, 48, 2))
    (folder / "images" / "text.png").write_text("no image")
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
    return folder


RECORDS = [
    {"id": "wide", "question": "What is the word?", "image": "images/wide.png"},
    {"id": 7, "question": "Which?", "images": ["images/wide.png", "images/tall.png"]},
    {"question": "What?"},
    {"id": "gone\ud800", "question": "What?", "image": "images/gone.png"},
    {"id": "broken", "question": "What?", "image": "images/text.png"},
    {"id": "literal", "question": "What does <image> mean?", "image": "images/wide.png"},
    {"id": "long", "question": "x" * 40000},
    {
        "id": "turns",
        "turns": [
            {"role": "user", "text": "What?"},
            {"role": "assistant", "text": "cat"},
            {"role": "user", "text": "Why?"},
        ],
        "image": "images/tall.png",
    },
]


def test_the_command_writes_a_line_for_every_question(folder, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    flags = {"checkpoint": folder / "model", "max_new_tokens": NEW_TOKENS, "batch_size": 2}
    assert run("generate", **flags, input=folder / "questions.jsonl", output=output) == 0
    out = capsys.readouterr().out
    assert f"wrote 5 answers to {output}" in out
    assert "3 of 8 questions could not be asked (broken_image 1, missing_image 1, too_long 1)" in out
    found = {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert list(found) == ["wide", 7, 3, "gone\ud800", "broken", "literal", "long", "turns"]
    assert found["gone\ud800"]["error"].startswith("missing_image: ")
    assert found["literal"]["tokens"] > 0

    loaded = load_for_inference(folder / "model")
    prompt = loaded.processor.prompt(question("What is the word?", [folder / "images" / "wide.png"]))
    (alone,) = Generator(loaded.model, loaded.tokenizer).generate([prompt], max_new_tokens=NEW_TOKENS)
    assert found["wide"] == {"id": "wide", "answer": alone.text, "finish": alone.finish, "tokens": len(alone.tokens)}


@pytest.mark.slow  # It compiles programs of two batch sizes; test_sampling.py tests the draws themselves.
def test_draws_depend_on_the_place_in_the_file_alone(folder):
    loaded = load_for_inference(folder / "model")
    generator = Generator(loaded.model, loaded.tokenizer)
    questions = [one for one in read_questions(folder / "questions.jsonl") if one.id in ("wide", 7, 3, "turns")]

    def texts(batch_size: int) -> list[object]:
        settings = {"max_new_tokens": NEW_TOKENS, "sampling": Sampling(1.5, seed=3)}
        return [
            reply for _, reply in answers(generator, loaded.processor, questions, batch_size=batch_size, **settings)
        ]

    assert texts(1) == texts(3)


def test_placeholders_stand_before_the_first_turn(folder):
    questions = {one.id: one.conversation for one in read_questions(folder / "questions.jsonl")}
    assert questions["turns"].turns == (
        Turn("user", IMAGE, "\nWhat?"),
        Turn("assistant", "cat"),
        Turn("user", "Why?"),
    )
    assert questions["turns"].images == (folder / "images" / "tall.png",)
    assert questions[7].turns == (Turn("user", IMAGE, " ", IMAGE, "\nWhich?"),)


def test_messages_place_their_images(tmp_path):
    def part(name):
        return {"type": "image", "path": name}

    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": ["Is ", part("a.png"), " like ", part("b.png"), " or <image>?"]},
    ]
    lines = [{"messages": messages}, {"messages": [messages[0], {"role": "user", "content": "Hi"}], "image": "c.png"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = (one.conversation for one in read_questions(tmp_path / "q.jsonl"))
    assert first.turns[1] == Turn("user", "Is ", IMAGE, " like ", IMAGE, " or <image>?")
    assert first.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert second.turns == (Turn("system", "S"), Turn("user", IMAGE, "\nHi"))
    assert second.images == (tmp_path / "c.png",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"messages": [{"role": "user", "content": [{"type": "video"}]}]}',
            ":2: The part messages[0][0] has the type",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "question": "b"}', ":2: it has 'messages' beside"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', ":2: the last of 'messages' is the assistant's"),
        ('{"messages": [{"role": "system", "content": "a"}]}', ":2: the last of 'messages' is the system's"),
        ("{", ":2: not valid JSON"),
        ('"\\xff"', ":2: not valid JSON"),
        ("[]", ":2: expected an object with the fields id, question, turns, image, images"),
        ('{"question": "a", "imgae": "b"}', ":2: unknown field 'imgae'; did you mean 'image'? known: id, question"),
        ('{"id": 1.5, "question": "a"}', ":2: id = 1.5: expected a text or an integer"),
        ('{"id": "first", "question": "a"}', ":2: id 'first' is that of line 1 too"),
        ('{"id": "a"}', ":2: expected one of 'question' and 'turns'"),
        ('{"question": "a", "turns": []}', ":2: expected one of 'question' and 'turns'"),
        ('{"question": 1}', ":2: question = 1: expected a text"),
        ('{"question": "a", "image": "b", "images": []}', ":2: it has both 'image' and 'images'"),
        ('{"question": "a", "image": 1}', "found [1]"),
        ('{"question": "a", "image": "https://a.b/c.png"}', ":2: The field 'image' contains the address"),
        ('{"question": "a", "image": "\\ud800.png"}', ":2: An image is not valid Unicode"),
        ('{"question": null, "image": "b"}', ":2: expected one of 'question' and 'turns'"),
        ('{"turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]}', ":2: 'turns' is a list of"),
        ('{"question": "a", "question": "b"}', ":2: not valid JSON (it has the key 'question' twice in one object"),
        ("[" * 100_000, ":2: not valid JSON (it is nested too deeply)"),
        (
            '{"turns": [{"role": "user", "text": "a", "image": "b.png"}]}',
            ":2: turn 1: unknown field 'image'; 'turns' is a list of",
        ),
        ('{"turns": [{"role": "assistant", "text": "a"}]}', ":2: turn 1: 'turns' is a list of"),
    ],
)
def test_malformed_lines_are_named(tmp_path, capsys, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"id": "first", "question": "a"}}\n{line}\n')
    flags = {"checkpoint": "/nowhere", "input": path, "output": tmp_path / "answers.jsonl"}
    assert run("generate", **flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"vr-jax generate: {path}")
    assert error.count("\n") == 1
    assert not (tmp_path / "answers.jsonl").exists()


def test_null_is_as_good_as_absent(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": null, "question": "a", "turns": null, "image": null, "images": null}\n')
    [question] = read_questions(path)
    assert question.id == 1
    assert question.conversation.images == ()


def test_an_image_may_stand_in_the_line_itself(tmp_path):
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "a", "images": [f"data:image/png;base64,{encoded}", encoded, "c.png"]}))
    [question] = read_questions(path)
    inside = base64.b64decode(encoded)
    assert question.conversation.images == (inside, inside, tmp_path / "c.png")


def test_a_file_without_questions(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no question; expected one JSON object on each line"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"absent\.jsonl cannot be read"):
        read_questions(tmp_path / "absent.jsonl")
