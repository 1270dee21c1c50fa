"""Damaged and incomplete data of every benchmark: named, never silently skipped."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluation.published import (
    FOLDERS,
    ROWS,
    images,
    publish,
    table,
    write,
    write_jsonl,
)
from tests.inference.tiny import png
from vr_jax.errors import UserError
from vr_jax.evaluation import bootstrap
from vr_jax.evaluation.benchmarks import PAPER, get_benchmark
from vr_jax.evaluation.bootstrap import value
from vr_jax.evaluation.files import Wanted, find_shards


@pytest.mark.parametrize("name", PAPER)
def test_damaged_rows_stay_with_their_problem(name, tmp_path):
    """Each column in turn is absent or of a wrong type; JSON can say both."""
    benchmark = get_benchmark(name)
    first, _ = ROWS[name]
    required = [column.name for column in benchmark.columns if not column.optional]
    rows = [first, *({k: v for k, v in first.items() if k != column} for column in required)]
    rows += [first | {column: {"a": 1}} for column in required]
    folder = write_jsonl(name, tmp_path / "jsonl", rows)
    path = next(folder.glob("*.jsonl"))
    more = [
        "[1]",
        "{",
        "null",
        json.dumps(first),
        json.dumps(first | dict.fromkeys(images(name, 0), "images/no.png")),
    ]
    path.write_text(path.read_text() + "\n".join(more) + "\n")
    items = benchmark.items(folder)
    assert len(items) == len(rows) + len(more)
    assert items[0].problem is None
    for item, column in zip(items[1:], required * 2, strict=False):
        assert item.problem.startswith(f"malformed_record: {column}: expected ")
    assert all(item.problem.startswith("malformed_record: ") for item in items[len(rows) : -2])
    assert items[-2].problem.startswith("missing_image: ")
    assert items[-1].problem is None  # found out when it is opened
    scores = [0.0] * len(items)
    assert all(value == 0 for key, value in benchmark.aggregate(items, scores).items() if key != "n_scored")
    assert bootstrap.value(benchmark.estimates(items, scores).overall) == 0


@pytest.mark.parametrize("name", PAPER)
def test_missing_columns_and_empty_folders_are_named(name, tmp_path):
    benchmark = get_benchmark(name)
    with pytest.raises(UserError, match=r"found neither .*\.jsonl nor .*-\*\.parquet.*the folder holds \[\]"):
        benchmark.items(tmp_path)
    split = benchmark.published.split
    write(tmp_path / FOLDERS.get(name, "data"), split, [{"question": "q", "else": 1}])
    with pytest.raises(UserError, match=r"\.parquet: the columns \[.*'answers?'.*found \['question', 'else'\]"):
        benchmark.items(tmp_path)


def test_a_download_that_broke_off_is_refused(tmp_path):
    publish("ai2d", tmp_path)
    next(tmp_path.rglob("test-00001-of-00002.parquet")).unlink()
    with pytest.raises(UserError, match=r"only 1 of 2 parquet files are there; the numbers \[1\] are missing"):
        get_benchmark("ai2d").items(tmp_path)


def test_texts_that_are_no_texts(tmp_path):
    """Invalid UTF-8 in a parquet file, lone surrogates and NUL in JSON."""
    rows = [row | {"image": png(8, 8, 0)} for row in ROWS["chartqa"] * 40]
    whole = table(rows)
    bad = pa.array([b"q"] * 70 + [b"\xff\xfe"] + [b"q"] * 9).view(pa.string())
    whole = whole.set_column(whole.column_names.index("question"), "question", bad)
    pq.write_table(whole, tmp_path / "test-0.parquet")
    items = get_benchmark("chartqa").items(tmp_path)
    assert [i for i, item in enumerate(items) if item.problem] == [70]
    assert items[70].problem.startswith("malformed_record: test-0.parquet, row 70: 'utf-8' codec")

    odd = [row | {"question": "\ud800\0 a", "answers": ["\udfff\0"] * 10} for row in ROWS["textvqa"]]
    items = get_benchmark("textvqa").items(write_jsonl("textvqa", tmp_path / "jsonl", odd))
    assert [item.question for item in items] == ["\ud800\0 a"] * 2
    assert get_benchmark("textvqa").score("\udfff\0", items[0]) == 1


def test_special_problems(tmp_path):
    def problem(name, **changes):
        folder = write_jsonl(
            name, tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", [ROWS[name][0] | changes, ROWS[name][1]]
        )
        item, _ = get_benchmark(name).items(folder)
        return item.problem

    assert problem("docvqa", answers=[]) == "no_answer: the list of answers is empty"
    assert problem("mmmu", options="['a'").startswith("malformed_record: options: expected the text of a Python list")
    assert problem("mmmu", options="3").startswith("malformed_record: options: expected the text of a Python list")
    assert problem("mmmu", question="<image 5>?") == "missing_image: image_5: the row has no such image"
    assert problem("mmmu", question_type="essay").endswith("expected multiple-choice or open, found 'essay'")
    assert problem("mme", answer="Maybe") == "malformed_record: answer: expected Yes or No, found 'Maybe'"
    assert problem("ai2d", answer="7") == "malformed_record: answer: expected an index of 4 choices, found 7"
    assert problem("ai2d", answer="x").endswith("expected a whole number, found 'x'")
    assert problem("scienceqa", answer=True).endswith("expected a whole number, found 'bool'")
    assert problem("ocrbench", answer="one text") is None


@pytest.mark.parametrize(("name", "columns"), [("mmstar", ("category", "l2_category")), ("mme", ("category",))])
def test_rows_without_category_are_wrong_and_no_category(name, columns):
    """Ten rows that are right and two damaged ones: ten twelfths of what the ten alone score."""
    benchmark = get_benchmark(name)
    kinds = ["existence", "count"] if name == "mme" else ["math", "logic"]
    good = [
        benchmark.item(str(i), dict.fromkeys(columns, kinds[i % 2]) | {"question_id": str(i // 4) + kinds[i % 2]})
        for i in range(10)
    ]
    bad = [benchmark.item(str(i), {}, problem="malformed_record: x") for i in (10, 11)]
    alone = benchmark.aggregate(good, [1.0] * 10)
    found = benchmark.aggregate([*good, *bad], [1.0] * 10 + [0.0] * 2)
    assert set(found) == set(alone)
    assert found[benchmark.headline] == pytest.approx(alone[benchmark.headline] * 10 / 12)
    estimates = benchmark.estimates([*good, *bad], [1.0] * 10 + [0.0] * 2)
    assert value(estimates.overall) == pytest.approx(value(benchmark.estimates(good, [1.0] * 10).overall) * 10 / 12)
    assert set(estimates.categories) == set(kinds)


def test_files_of_two_downloads_are_refused(tmp_path):
    for name in ("test-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"):
        (tmp_path / f"{name}.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="come from different downloads, so that some rows would count twice"):
        find_shards(tmp_path, Wanted("test"), ())
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "test-all.parquet")
    with pytest.raises(UserError, match="come from different downloads"):
        find_shards(tmp_path, Wanted("test"), ())
    (tmp_path / "test-all.parquet").rename(tmp_path / "test-00001-of-00002-b.parquet")
    with pytest.raises(UserError, match=r"'test-00001-of-00002-b\.parquet'.* come from different downloads"):
        find_shards(tmp_path, Wanted("test"), ())


@pytest.mark.parametrize("name", PAPER)
def test_a_column_that_every_row_of_a_jsonl_lacks_is_named(name, tmp_path):
    benchmark = get_benchmark(name)
    required = [column.name for column in benchmark.columns if not column.optional]
    for column in (*required, *list(images(name, 0))[:1]):
        folder = write_jsonl(name, tmp_path / column)
        path = next(folder.glob("*.jsonl"))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key != column} for row in rows]
        path.write_text("\n".join(map(json.dumps, kept)) + "\n[1]\n")
        with pytest.raises(
            UserError, match=rf"jsonl: every row lacks the columns \['{column}'\]; found the columns \['"
        ):
            benchmark.items(folder)
        path.write_text("\n".join(map(json.dumps, [rows[0], *kept[1:]])))  # one has it: the other's problem
        assert [item.problem is None for item in benchmark.items(folder)] == [True, False]
