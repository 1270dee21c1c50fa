"""Files of one's own, from the settings of an evaluation to scores, folders and the report."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from tests.inference import tiny
from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation
from vr_jax.errors import UserError
from vr_jax.evaluation import evaluate, evaluate_items, load_results, own_benchmark, score_table, write_run_report
from vr_jax.evaluation.report_items import report_items
from vr_jax.inference import Buckets, Generator, user_turn
from vr_jax.settings import EvaluationSettings

HTML = "Is <script>alert(1)</script> & <b>bold</b> a word?"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory, images, two files of one's own and one of ChartQA."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save(folder / "model", vision_remember=False)
    images = folder / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").write_bytes(tiny.png(30, 15, number))
    asked = [{"id": f"q{k}", "image": f"{k}.png", "question": "What?", "answer": "x"} for k in range(4)]
    asked[1] |= {"question": HTML, "category": "html"}
    asked[3] |= {"image": "gone.png"}
    write(folder / "mine.jsonl", *asked)
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "cat"},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "red"},
    ]
    (folder / "talks.json").write_text(json.dumps([{"id": "t", "image": "0.png", "conversations": turns}]))
    write(folder / "open.jsonl", *({name: one[name] for name in ("id", "image", "question")} for one in asked[:2]))
    (folder / "chartqa").mkdir()
    (folder / "chartqa" / "0.png").write_bytes(tiny.png(30, 15, 0))
    write(
        folder / "chartqa" / "test.jsonl",
        {"type": "human_test", "question": "What?", "answer": "1", "image": "0.png"},
    )
    return folder


def settings(folder, output, *names, **changes):
    text = ",".join(name.format(folder) for name in names)
    base = EvaluationSettings(
        checkpoint=str(folder / "model"),
        benchmark=text,
        images=str(folder / "images") if "=" in text else None,
        output=str(output),
        batch_size=4,
        max_new_tokens=4,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """Two own files beside a published benchmark whose folder `data` is, and one without answers."""
    output = tmp_path_factory.mktemp("out")
    names = ("mine={0}/mine.jsonl:contains", "talks={0}/talks.json:anls", "chartqa", "open={0}/open.jsonl")
    return output, evaluate(settings(folder, output, *names, data=str(folder / "chartqa")))


def test_each_file_has_a_folder_a_score_and_a_row(done):
    output, outcome = done
    assert list(outcome.summaries) == ["mine", "talks", "chartqa"]
    mine = outcome.summaries["mine"]
    assert (mine["items"], mine["headline"], set(mine["categories"])) == (4, "contains", {"all", "html"})
    assert mine["settings"]["rules"] == {"metric": "contains"}
    assert mine["unscored"]["by_reason"] == {"missing_image": 1}
    assert [one.id for one in load_results(output / "talks")] in (["t#0", "t#2"], ["t#2", "t#0"])
    table = score_table(outcome.summary)
    for words in ("contains = ", "anls = ", "relaxed_overall = "):
        assert words in table
    assert "rules" not in outcome.summaries["chartqa"]["settings"]


def test_questions_without_answers_are_answered_only(done):
    output, outcome = done
    assert outcome.predictions == {"open": output / "open" / "submission.json"}
    assert [set(one) for one in json.loads(outcome.predictions["open"].read_bytes())] == [{"id", "answer"}] * 2


def test_the_report_shows_own_questions_as_text(done):
    _, outcome = done
    page = write_run_report(outcome).read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "user: &lt;image&gt;" in page
    assert "metric contains: the reply contains an answer" in page


def test_a_second_command_adds_to_the_summary_and_continues(folder, done):
    output, outcome = done
    again = evaluate(settings(folder, output, "mine={0}/mine.jsonl:contains"))
    assert set(again.summary["benchmarks"]) == {"chartqa", "mine", "talks"}
    assert again.summaries["mine"]["score"] == outcome.summaries["mine"]["score"]
    with pytest.raises(UserError, match=r"rules.metric: 'contains' there, 'exact' now"):
        evaluate(settings(folder, output, "mine={0}/mine.jsonl:exact"))


def test_a_mistake_in_one_file_is_told_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(sys.modules[evaluate.__module__], "load_for_inference", load)
    bad = write(tmp_path / "bad.jsonl", {"question": "What?", "anwser": "x"})
    with pytest.raises(UserError, match="line 1: unknown field 'anwser'"):
        evaluate(settings(folder, tmp_path / "out", f"bad={bad}"))


def test_a_conversation_is_asked_as_it_stands_and_a_question_with_its_images_in_front(folder):
    """The replies are those of the model to the same prompts, built here by hand."""
    config = tiny.config(vision_remember=False)
    generator = Generator(tiny.model(config), tiny.TOKENIZER, Buckets(tokens=(112,), tiles=(4,)))
    processor = Processor(tiny.TOKENIZER, config)

    def answer(conversation):
        return generator.generate([processor.prompt(conversation)], max_new_tokens=4, rows=4)[0].text.strip()

    images = folder / "images"
    for name, metric in (("talks.json", "anls"), ("mine.jsonl", "contains")):
        benchmark = own_benchmark("own", folder / name, images=images, metric=metric, limit=2)
        items = benchmark.items()
        found = evaluate_items(
            generator, processor, benchmark, items, batch_size=4, max_new_tokens=4, progress=False
        ).results
        for item, result in zip(items, found, strict=True):
            turns = item.turns or (user_turn(item.question, 1),)
            assert result.prediction == answer(Conversation("x", turns, item.images))
        shown = report_items(
            evaluate_items(generator, processor, benchmark, items, batch_size=4, max_new_tokens=4, progress=False),
            generator,
            processor,
            2,
            batch_size=4,
        )
        assert [one.question for one in shown] == [benchmark.prompt(item) for item in items]
