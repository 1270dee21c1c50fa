"""Splits whose answers are not published: predictions are written for the benchmark's server, without a score."""

from __future__ import annotations

import json

import pytest

from tests.evaluation.published import ROWS, publish, write_jsonl
from tests.inference import tiny
from vr_jax.cli.main import main
from vr_jax.evaluation import runner
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.interface import ItemResult
from vr_jax.inference import Reply

# How the published test splits lack their answers.
LACKING = {
    "docvqa": {"answers": None, "question_types": None},
    "textvqa": {"answers": [""] * 10},
    "mmmu": {"answer": "?"},
}
SUBMISSIONS = {
    "docvqa": [{"questionId": 1, "answer": "B"}, {"questionId": 2, "answer": "B"}],
    "textvqa": [{"question_id": 0, "answer": "B"}, {"question_id": 1, "answer": "B"}],
    "mmmu": {"validation_Art_Theory_1": "B", "validation_Math_2": "B"},
}


def rows_of(name, **changes):
    return [row | (changes or LACKING.get(name, {"answer": None})) for row in ROWS[name]]


@pytest.mark.parametrize("name", [*LACKING, "chartqa", "gqa", "realworldqa", "ai2d", "mmstar"])
@pytest.mark.parametrize("layout", [publish, write_jsonl])
def test_rows_without_answers_are_asked(name, layout, tmp_path):
    if name == "gqa" and layout is write_jsonl:
        pytest.skip("its published images lie in files of their own")
    items = get_benchmark(name).items(layout(name, tmp_path / "data", rows_of(name)))
    assert [item.problem for item in items] == [None, None]
    assert [item.labelled for item in items] == [False, False]
    assert all(item.answers == () and item.images for item in items)


def test_a_row_that_alone_lacks_its_answer_is_a_problem(tmp_path):
    rows = ROWS["docvqa"]
    items = get_benchmark("docvqa").items(publish("docvqa", tmp_path / "one", [rows[0], rows[1] | {"answers": None}]))
    assert [item.labelled for item in items] == [True, True]
    assert [item.problem for item in items] == [None, "malformed_record: answers: expected a text or a list of texts, "
                                                "found nothing"]  # fmt: skip
    rows = ROWS["mmmu"]
    items = get_benchmark("mmmu").items(publish("mmmu", tmp_path / "mark", [rows[0], rows[1] | {"answer": "?"}]))
    assert [(item.problem, item.answers) for item in items] == [(None, ("B",)), (None, ("?",))]


@pytest.mark.parametrize("name", LACKING)
def test_predictions_have_the_format_of_the_server(name, tmp_path):
    benchmark = get_benchmark(name)
    items = benchmark.items(publish(name, tmp_path, rows_of(name)))
    results = [ItemResult(one.id, one.category, one.question, (), "B", 0.0) for one in items]
    assert benchmark.submission(items, results) == SUBMISSIONS[name]


def test_the_default_format_names_the_items(tmp_path):
    benchmark = get_benchmark("chartqa")
    items = benchmark.items(publish("chartqa", tmp_path, rows_of("chartqa")))
    results = [ItemResult(one.id, one.category, one.question, (), None, 0.0) for one in items]
    assert benchmark.submission(items, results) == [
        {"id": "test-00000", "answer": ""},
        {"id": "test-00001", "answer": ""},
    ]


def test_an_evaluation_without_answers_writes_predictions_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        runner, "_replies", lambda generator, prepared, *_: {number: Reply("B", (1,), "stop") for number in prepared}
    )
    tiny.save(tmp_path / "model", vision_remember=False)
    publish("docvqa", tmp_path / "data" / "docvqa", rows_of("docvqa"))
    publish("chartqa", tmp_path / "data" / "chartqa", [row | {"answer": "B"} for row in ROWS["chartqa"]])
    command = ["eval", f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path / 'out'}", "--batch_size=8"]
    assert main([*command, "--benchmark=docvqa", f"--data={tmp_path / 'data'}"]) == 0
    out = capsys.readouterr().out
    submission = tmp_path / "out" / "docvqa" / "submission.json"
    said = "docvqa: these data have no reference answers, so there is no score; predictions to submit: "
    assert out == f"{said}{submission}\n"
    assert json.loads(submission.read_text()) == SUBMISSIONS["docvqa"]
    summary = json.loads((tmp_path / "out" / "docvqa" / "summary.json").read_text())
    assert (summary["score"], summary["items"]) == (None, 2)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()

    both = [*command, "--benchmark=docvqa,chartqa", f"--data={tmp_path / 'data'}", "--report_items=0"]
    assert main(both) == 0
    out = capsys.readouterr().out
    assert "ChartQA" in out
    assert "100.00" in out
    assert said in out
    assert "DocVQA-val" not in out
    assert main([*command, "--benchmark=chartqa", f"--data={tmp_path / 'data'}", "--report_items=0"]) == 0
    assert (
        "docvqa: its earlier result is not combined with these: the split has no reference" in capsys.readouterr().out
    )
