"""Where items come from: both layouts of ChartQA, unusable rows, and what is wrong with a folder."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.discovery import DATA_ROOT, needs_data
from tests.inference.tiny import png
from vr_jax.data.demo.source import DemoSource
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.benchmarks.demo import DemoHeldOut

ROWS = [
    {"type": "human_test", "question": "How many?", "answer": "14"},
    {"type": "augmented_test", "question": "Which one?", "answer": "A"},
    {"type": "human_test", "question": "Why?", "answer": "é"},
]


@pytest.fixture
def chartqa():
    return get_benchmark("chartqa")


@pytest.fixture
def jsonl(tmp_path):
    folder = tmp_path / "jsonl"
    (folder / "images").mkdir(parents=True)
    for i in range(len(ROWS)):
        (folder / "images" / f"{i}.png").write_bytes(png(8, 8, i))
    rows = [row | {"image": f"images/{i}.png", "more": i} for i, row in enumerate(ROWS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    rows = [row | {"image": {"bytes": png(8, 8, i), "path": None}} for i, row in enumerate(ROWS)]
    for shard, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), folder / "data" / f"test-0000{shard}-of-00002-abc.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_both_layouts_give_the_same_items(chartqa, jsonl, parquet):
    files, inside = chartqa.items(jsonl, "test"), chartqa.items(parquet, "test")
    assert [item.images[0].read_bytes() for item in files] == [item.images[0] for item in inside]
    for a, b, row in zip(files, inside, ROWS, strict=True):
        assert (a.id, a.question, a.answers, a.category, a.problem) == (b.id, b.question, b.answers, b.category, None)
        assert (a.question, a.answers) == (row["question"], (row["answer"],))
    assert [item.id for item in files] == ["test-00000", "test-00001", "test-00002"]
    assert [item.category for item in files] == ["human", "augmented", "human"]
    assert chartqa.prompt(files[0]) == "How many?\nAnswer the question with a single word."
    assert len(chartqa.items(parquet, "train")) == 3
    assert len(chartqa.items(jsonl / "test.jsonl", "test")) == 3
    assert len(chartqa.items(next(parquet.rglob("test-00000*")), "test")) == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"type": "human_test", "question": "a?", "image": "images/0.png"}',
            "malformed_record: answer: expected a text, found nothing",
        ),
        (
            '{"type": "x", "question": 3, "answer": "1", "image": "images/0.png"}',
            "question: expected a text, found int",
        ),
        ('{"type": "x", "question": "a?", "answer": "1"}', "missing_image: the row has no image"),
        ('{"type": "x", "question": "a?", "answer": "1", "image": "../x.png"}', "outside_folder"),
        ('{"type": "x", ', "malformed_record: test.jsonl, line 4"),
        ("[1]", "malformed_record"),
        ("\xff", "malformed_record: test.jsonl, line 4"),
    ],
)
def test_an_unusable_row_says_why_and_the_others_stay(chartqa, jsonl, line, problem):
    path = jsonl / "test.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    items = chartqa.items(jsonl, "test")
    assert [item.problem for item in items[:3]] == [None] * 3
    assert len(items) == 4
    assert re.search(problem, items[3].problem)


def test_a_folder_without_the_benchmark_is_explained(chartqa, jsonl, parquet, tmp_path):
    with pytest.raises(UserError, match=r"found neither val\.jsonl nor val-\*\.parquet .*test\.jsonl"):
        chartqa.items(jsonl, "val")
    with pytest.raises(UserError, match="no such file or folder"):
        chartqa.items(tmp_path / "absent", "test")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="split 'test' has no rows"):
        chartqa.items(tmp_path / "empty", "test")
    broken = tmp_path / "test-1.parquet"
    broken.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable parquet file"):
        chartqa.items(broken, "test")
    pq.write_table(pa.table({"question": ["a"], "image": [b"x"]}), broken)
    with pytest.raises(UserError, match=r"the columns \['type', 'answer'\] are missing; found \['question', 'image'\]"):
        chartqa.items(broken, "test")


def test_unknown_benchmarks_and_profiles_list_the_known():
    with pytest.raises(UserError, match=r"unknown benchmark .chart.; did you mean chartqa\? known: ai2d"):
        get_benchmark("chart")
    with pytest.raises(UserError, match=r"unknown profile 'v9'; known: default, v0\.5"):
        get_benchmark("chartqa", "v9")


@needs_data("chartqa", "test.jsonl")
def test_real_chartqa(chartqa):
    items = chartqa.items(DATA_ROOT / "chartqa", "test")
    assert all(item.problem is None and item.images[0].is_file() for item in items)
    assert {item.category for item in items} == {"human", "augmented"}
    perfect = chartqa.aggregate(items, [chartqa.score(item.answers[0], item) for item in items])
    assert perfect == {"relaxed_overall": 1, "relaxed_human_split": 1, "relaxed_augmented_split": 1}


def test_demo_has_two_splits():
    demo = DemoHeldOut(size=3)
    assert demo.items(split="held_out")[0] == demo.items()[0] != demo.items(split="train")[0]
    with pytest.raises(UserError, match="demo has no split 'test'; it has 'held_out', the default, and 'train'"):
        demo.items(split="test")


def test_demo_items_are_the_held_out_questions():
    benchmark = DemoHeldOut(size=30, seed=5)
    items = benchmark.items()
    source = DemoSource("held_out", 30, seed=5)
    for item, conversation in zip(items, (source[i] for i in range(30)), strict=True):
        assert conversation.turns[0].text == f"<image>\n{benchmark.prompt(item)}"
        assert conversation.turns[1].text == item.answers[0]
        assert conversation.images == item.images
    metrics = benchmark.aggregate(items, [float(i < 10) for i in range(30)])
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    most = max([i.answers[0] for i in items].count(i.answers[0]) for i in items)
    assert metrics["majority_baseline"] == pytest.approx(most / 30)
    assert {item.category for item in items} == set(metrics) - {"accuracy", "majority_baseline"}
    assert benchmark.score("cat", items[0]) == 0
    assert benchmark.score(benchmark.clean(f" {items[0].answers[0]}\n"), items[0]) == 1
