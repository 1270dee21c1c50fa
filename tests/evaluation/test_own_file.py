"""A file of one's own: what its records become, and how what cannot be honoured is refused."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.inference.tiny import png
from vr_jax.data.llava_json import LlavaJsonSource
from vr_jax.errors import UserError
from vr_jax.evaluation import own_benchmark

PNG = png(30, 15)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


def lines(folder, *records, name="own.jsonl"):
    path = folder / name
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def read(path, metric="exact", **options):
    return own_benchmark("mine", path, metric=metric, **options).items()


def llava(*texts, **fields):
    messages = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"image": "a.png", "conversations": messages} | fields


def question(**fields):
    return {"image": "a.png", "question": "Which?", "answer": "red"} | fields


def test_questions_become_items(folder):
    path = lines(
        folder,
        {"id": "one", "image": "a.png", "question": "Which colour?", "answer": " red ", "category": "colour"},
        {"id": 2, "images": ["a.png", "b.png"], "question": "How many?", "answers": ["2", "two"], "category": None},
        "",
        {"question": "What is 6 times 7?", "answer": 42},
    )
    first, second, third = read(path)
    assert (first.id, first.question, first.answers, first.category) == ("one", "Which colour?", ("red",), "colour")
    assert first.images == ((folder / "a.png").resolve(),)
    assert (second.id, second.answers, second.category, len(second.images)) == ("2", ("2", "two"), "all", 2)
    assert (third.id, third.answers, third.images) == ("own.jsonl#2", ("42",), ())


def test_images_may_lie_in_another_folder_or_in_the_record(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    text = base64.b64encode(PNG).decode()
    path = lines(other, question(id="a"), question(id="b", image=f"data:image/png;base64,{text}"))
    first, second = read(path, images=folder)
    assert first.images == ((folder / "a.png").resolve(),)
    assert second.images == (PNG,)


def test_each_turn_of_a_conversation_is_a_question_with_the_turns_before_it(folder):
    path = lines(folder, llava("<image>\nWhich colour?", "red", "How many?", "3", id="c", category="two"))
    first, second = read(path)
    assert (first.id, first.question, first.answers, first.category) == ("c#0", "Which colour?", ("red",), "two")
    assert (second.id, second.question, second.answers) == ("c#2", "How many?", ("3",))
    assert [turn.role for turn in second.turns] == ["user", "assistant", "user"]
    assert [turn.text for turn in first.turns] == ["<image>\nWhich colour?"]
    benchmark = own_benchmark("mine", path)
    assert benchmark.prompt(second) == "user: <image>\nWhich colour?\nassistant: red\nuser: How many?"
    assert benchmark.prompt(first) == "<image>\nWhich colour?"


def test_only_the_images_up_to_the_question_belong_to_it(folder):
    record = llava("<image>\nThis?", "red", "And <image>?", "blue", image=["a.png", "b.png"])
    first, second = read(lines(folder, record))
    assert (len(first.images), len(second.images)) == (1, 2)


def test_the_file_that_trains_also_scores(folder):
    """The last question of a conversation is asked with the turns that training reads from the same record."""
    records = [llava("<image>\nWhich?", "red", "And?", "blue", id=f"r{k}", system="Be brief.") for k in range(3)]
    path = folder / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode())  # with a byte order mark
    source = LlavaJsonSource(path, folder)
    items = read(path)
    assert len(items) == 6
    for conversation, item in zip(source, items[1::2], strict=True):
        assert item.turns == conversation.turns[:-1]
        assert item.answers == (conversation.turns[-1].text,)
        assert item.images == conversation.images
        assert item.turns[0].role == "system"


def test_repeated_ids_of_conversations_are_told_apart(folder):
    """In LLaVA's data the id names the image."""
    path = lines(folder, llava("<image>\na?", "1", id="x"), llava("<image>\nb?", "2", id="x"))
    assert [item.id for item in read(path)] == ["x", "x@1"]


def test_parquet_files_hold_questions_or_conversations(folder):
    rows = [{"question": "Which?", "answers": ["red"], "image": {"bytes": PNG, "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    (item,) = read(folder / "q.parquet")
    assert (item.answers, item.images) == (("red",), (PNG,))
    rows = [llava("<image>\nWhich?", "red", image={"bytes": PNG, "path": None})]
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
    (item,) = read(folder / "c.parquet")
    assert (item.question, item.answers, item.images) == ("Which?", ("red",), (PNG,))


def test_answers_of_choices_are_letters(folder):
    choices = ["a cat", "a dog", "7"]
    given = ["B", "b", "a dog", 1, "7", 2]
    path = lines(folder, *(question(id=k, choices=choices, answer=one) for k, one in enumerate(given)))
    items = read(path, "choice")
    assert [item.answers for item in items] == [("B",), ("B",), ("B",), ("B",), ("C",), ("C",)]
    prompt = own_benchmark("mine", path, metric="choice").prompt(items[0])
    assert prompt.startswith("Which?\nA. a cat\nB. a dog\nC. 7\nAnswer with the option's letter")


def test_questions_without_any_answer_are_not_labelled(folder):
    asked = question(id="a")
    del asked["answer"]
    (first, second) = read(lines(folder, asked, llava("<image>\nWhich?", id="b")))
    assert not first.labelled
    assert not second.labelled
    choices = read(lines(folder, asked | {"choices": ["x", "y"]}), "choice")
    assert not choices[0].labelled


def test_limit_takes_the_first_questions(folder):
    path = lines(folder, *(question(id=k) for k in range(5)))
    assert [item.id for item in read(path, limit=2)] == ["0", "1"]


LACKS = {"image": "a.png", "question": "Which?"}
REFUSED = [
    ("exact", [question(anwser="x")], r"line 1: unknown field 'anwser'; did you mean 'answer'\?"),
    ("exact", [question(id="a"), "", question(id="a")], r"line 3: id = 'a' is that of another question, line 1"),
    ("exact", [question(), question(answer="")], "line 2: the field 'answer' has an empty text"),
    ("exact", [question(answer=None, answers=[])], r"line 1: answers = \[\]: expected a list with at least one"),
    ("exact", [question(answers=["x"])], "line 1: it has both 'answer' and 'answers'"),
    ("exact", [question(answer=0.5)], "line 1: the field 'answer' has 0.5: expected a text or a whole number"),
    ("exact", [question(answer=True)], "line 1: the field 'answer' has True"),
    ("exact", [question(), LACKS], "1 of 2 questions have no answer, the first one in line 2"),
    ("exact", [llava("<image>\na?", "1", "b?")], "1 of 2 questions have no answer, the first one in line 1"),
    ("exact", [question(image="../x.png")], r"line 1: The image path '../x.png' leads out of the image folder"),
    ("exact", [question(image="/etc/passwd")], "line 1: The image path '/etc/passwd' leads out"),
    ("exact", [question(image="http://a/b.png")], "line 1: .*nothing is downloaded"),
    ("exact", [question(image="zz.png")], "zz.png does not exist, and neither does any other image file.*--images"),
    ("exact", [question(question=" ")], "line 1: the field 'question' is empty"),
    ("exact", [question(question="<image>\nWhich?")], "line 1: the field 'question' has <image>, which is a text"),
    ("exact", [question(question="a\ud83d?")], "line 1: The field 'question' is not valid Unicode"),
    ("exact", [question(category=3)], "line 1: The field 'category' is a value of type int"),
    ("exact", [question(category="")], "line 1: The field 'category' is empty"),
    ("exact", [question(id=[1])], r"line 1: id = \[1\]: expected a text or a whole number"),
    ("exact", [question(choices=["a", "b"])], "line 1: the field 'choices' has no effect with the metric exact; use"),
    ("exact", ["[1, 2]"], "expected a record, found a int"),
    ("exact", ['{"question": "a", "question": "b"}'], "line 1: the record cannot be read: it has the key 'question'"),
    ("exact", [question(), '{"question": '], "line 2: the text is not JSON"),
    ("exact", [""], "there is no question"),
    ("exact", ["[]"], "there is no question"),
    ("exact", ['{"data": []}'], "the file is one object with the keys 'data'"),
    ("exact", [llava("<image>\na?", "1", answer="2")], "line 1: the field 'answer' stands beside a conversation"),
    ("exact", [llava("a?", "1")], r"line 1: the record has 1 image\(s\), but its messages have 0 place"),
    ("exact", [llava("<image>\na?", " ")], "line 1: a reply is empty"),
    ("exact", [llava("<image>\na?", "1", video="x.mp4")], "line 1: The record has the key 'video'"),
    ("exact", [{"conversations": [{"from": "gpt", "value": "1"}]}], "line 1: no message is the user's"),
    ("exact", [llava("<image>\na?", "1", conversations=[])], "line 1: The list in the field 'conversations' is empty"),
    ("choice", [question()], "line 1: the metric choice needs the field 'choices'; .* exact, relaxed"),
    ("choice", [llava("<image>\na?", "A")], "line 1: a conversation has no choices"),
    ("choice", [question(choices=["a"])], "line 1: choices = .*expected a list of 2 to 26 texts"),
    ("choice", [question(choices=["x", "x"], answer=0)], "line 1: the field 'choices' has the same text twice"),
    ("choice", [question(choices=["x", "y"], answer=2)], "line 1: answer = 2: expected the number of a choice, 0 to 1"),
    ("choice", [question(choices=["x", "y"], answer="z")], "line 1: answer = 'z': expected the letter of a choice"),
    ("choice", [question(choices=["b", "a"], answer="b")], "line 1: answer = 'b' is the letter of one choice and the"),
    ("letter", [question()], "line 1: the metric letter expects one of the letters A, B, C, D as the answer"),
    ("vqa", [question()], "line 1: the metric vqa compares .* several people, found 1: expected at least 4"),
]


@pytest.mark.parametrize(("metric", "records", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused_in_one_line(folder, metric, records, message):
    path = lines(folder, *records)
    with pytest.raises(UserError, match=message) as caught:
        read(path, metric)
    assert str(path) in str(caught.value) or "zz.png" in message
    assert "\n" not in str(caught.value)


def test_some_missing_images_cost_their_questions_only(folder):
    items = read(lines(folder, question(id="a"), question(id="b", image="gone.png")))
    assert [item.problem for item in items] == [None, None]


def test_links_out_of_the_folder_have_to_be_meant(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "c.png"
    other.write_bytes(PNG)
    (folder / "link.png").symlink_to(other)
    path = lines(folder, question(image="link.png"))
    with pytest.raises(UserError, match="by a link; set follow_links"):
        read(path)
    assert len(read(path, follow_links=True)) == 1


def test_other_files_are_refused(folder):
    with pytest.raises(UserError, match="expected a file of questions, found a folder"):
        read(folder)
    with pytest.raises(UserError, match="no such file"):
        read(folder / "absent.jsonl")
    with pytest.raises(UserError, match=r"expected the name of a \.json, \.jsonl, \.parquet file"):
        read(folder / "a.png")
    (folder / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(folder / "bad.parquet")
    with pytest.raises(UserError, match="no such image folder"):
        read(lines(folder, question()), images=folder / "absent")
