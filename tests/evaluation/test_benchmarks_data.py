"""Every benchmark's data: the published parquet layout and JSONL give the same items; damaged and incomplete data."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.discovery import DATA_ROOT, needs_data
from tests.inference.tiny import png
from vr_jax.evaluation import statistics
from vr_jax.evaluation.benchmarks import PAPER, get_benchmark
from vr_jax.evaluation.files import Wanted, find_shards
from vr_jax.evaluation.statistics import value
from vr_jax.evaluation.types import EvaluationError

# Two rows each, with all columns that the published files have and the benchmark reads, and one more.
ROWS = {
    "gqa": [
        {"id": "1", "imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}},
        {"id": "2", "imageId": "n1", "question": "What is it?", "answer": "car", "types": {"structural": "query"}},
    ],
    "mme": [
        {
            "question_id": "x/1.png",
            "question": f"Is it {what}? Please answer yes or no.",
            "answer": answer,
            "category": "OCR",
        }
        for what, answer in [("a", "Yes"), ("b", "No")]
    ],
    "realworldqa": [
        {"question": "Which?\n\nA. x\nB. y", "answer": "B", "image_path": "p"},
        {"question": "How many?", "answer": "2", "image_path": "q"},
    ],
    "scienceqa": [
        {"question": "q", "choices": ["x", "y"], "answer": 1, "hint": "h", "subject": "natural science", "skill": "s"},
        {
            "question": "r",
            "choices": ["x", "y", "z"],
            "answer": 0,
            "hint": "",
            "subject": "social science",
            "skill": "s",
        },
    ],
    "ai2d": [{"question": f"q{i}", "options": list("wxyz"), "answer": str(i)} for i in range(2)],
    "mmmu": [
        {
            "id": "validation_Art_Theory_1",
            "question": "Which of <image 2> or <image 1>?",
            "options": "['<image 2>', \"it's\"]",
            "question_type": "multiple-choice",
            "answer": "B",
        },
        {
            "id": "validation_Math_2",
            "question": "Find x in <image 1>",
            "options": "[]",
            "question_type": "open",
            "answer": "3",
        },
    ],
    "mmstar": [
        {
            "index": i,
            "question": f"q{i}\nOptions: A: x, B: y",
            "answer": "B",
            "category": "math",
            "l2_category": f"c{i}",
        }
        for i in range(2)
    ],
    "chartqa": [
        {"type": "human_test", "question": "q", "answer": "1"},
        {"type": "augmented_test", "question": "r", "answer": "2"},
    ],
    "docvqa": [
        {"questionId": "1", "question": "q", "answers": ["a", "b"], "question_types": ["layout", "form"]},
        {"questionId": "2", "question": "r", "answers": ["c"], "question_types": ["table/list"]},
    ],
    "textvqa": [{"question_id": i, "question": "what NASA?", "answers": ["a"] * 10} for i in range(2)],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "q", "question_type": "Regular Text Recognition", "answer": ["a"]},
        {"dataset": "HME100k", "question": "r", "question_type": "Formulas", "answer": ["b", "c"]},
    ],
}
CATEGORIES = {
    "gqa": ["verify", "query"],
    "mme": ["OCR", "OCR"],
    "realworldqa": ["letter", "open"],
    "scienceqa": ["natural science", "social science"],
    "ai2d": ["all", "all"],
    "mmmu": ["Art_Theory", "Math"],
    "mmstar": ["math", "math"],
    "chartqa": ["human", "augmented"],
    "docvqa": ["layout", "table/list"],
    "textvqa": ["all", "all"],
    "ocrbench": ["Regular Text Recognition", "Formulas"],
}
FOLDERS = {"gqa": "testdev_balanced_instructions", "scienceqa": "ScienceQA-IMG", "docvqa": "DocVQA"}
IMAGES = "testdev_balanced_images"


def pictures(name, i):
    """The columns of row i with its pictures' contents."""
    if name == "mmmu":
        return {f"image_{k}": png(8, 8, 10 * i + k) if k <= 2 - i else None for k in range(1, 8)}
    return {"image": png(8, 8, 0 if name == "gqa" else i)}


def cell(content):
    return None if content is None else {"bytes": content, "path": "a.png"}


def table(rows):
    return pa.Table.from_pylist(rows)


def write(folder, split, rows, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    size = math.ceil(len(rows) / shards)
    for k in range(shards):
        path = folder / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        pq.write_table(table(rows[k * size : (k + 1) * size]), path)
    return folder


def publish(name, folder, rows=None):
    """The layout on the hub; `rows` without pictures."""
    rows = ROWS[name] if rows is None else rows
    split = get_benchmark(name).published.split
    if name == "gqa":
        write(folder / IMAGES, split, [{"id": "n1", "image": cell(png(8, 8, 0))}])
        write(folder / FOLDERS[name], split, rows)
    else:
        full = [row | {k: cell(v) for k, v in pictures(name, i).items()} for i, row in enumerate(rows)]
        write(folder / FOLDERS.get(name, "data"), split, full, shards=len(rows))
    if name == "mmstar":
        first, second = sorted(folder.rglob("*.parquet"))
        whole = pa.concat_tables([pq.read_table(first), pq.read_table(second)])
        pq.write_table(whole, folder / "mmstar.parquet")
        first.unlink()
        second.unlink()
    return folder


def write_jsonl(name, folder, rows=None):
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(ROWS[name] if rows is None else rows):
        names = {}
        for column, content in pictures(name, i).items():
            if content is not None:
                names[column] = f"images/{i}_{column}.png"
                (folder / names[column]).write_bytes(content)
        lines.append(json.dumps(row | names))
    split = get_benchmark(name).published.split
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", PAPER)
def test_both_layouts_give_the_same_items(name, tmp_path):
    benchmark = get_benchmark(name)
    published = benchmark.items(publish(name, tmp_path / "published"))
    files = benchmark.items(write_jsonl(name, tmp_path / "jsonl"))
    for i, (a, b) in enumerate(zip(published, files, strict=True)):
        assert (a.problem, b.problem) == (None, None)
        assert (a.id, a.question, a.answers, a.category, a.fields) == (
            b.id,
            b.question,
            b.answers,
            b.category,
            b.fields,
        )
        expected = [content for content in pictures(name, i).values() if content is not None]
        assert list(a.images) == [path.read_bytes() for path in b.images] == expected
        assert benchmark.prompt(a) == benchmark.prompt(b)
    split = benchmark.published.split
    assert [item.id for item in published] == [f"{split}-00000", f"{split}-00001"]
    assert [item.category for item in published] == CATEGORIES[name]


@pytest.mark.parametrize("name", PAPER)
def test_a_reference_as_the_reply_is_right(name, tmp_path):
    benchmark = get_benchmark(name)
    items = benchmark.items(publish(name, tmp_path))
    scores = [benchmark.score(benchmark.clean(f" {item.answers[0]}\n"), item) for item in items]
    assert scores == [1, 1]
    estimates = benchmark.estimates(items, scores)
    assert all(statistics.value(strata) == pytest.approx(100) for strata in estimates.categories.values())
    overall = {"mme": 10, "ocrbench": 0.2}.get(name, 100)  # one of ten categories; two of a thousand
    assert statistics.value(estimates.overall) == pytest.approx(overall)


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
        json.dumps(first | dict.fromkeys(pictures(name, 0), "images/no.png")),
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
    assert statistics.value(benchmark.estimates(items, scores).overall) == 0


@pytest.mark.parametrize("name", PAPER)
def test_missing_columns_and_empty_folders_are_named(name, tmp_path):
    benchmark = get_benchmark(name)
    with pytest.raises(EvaluationError, match=r"found neither .*\.jsonl nor .*-\*\.parquet.*it holds \[\]"):
        benchmark.items(tmp_path)
    split = benchmark.published.split
    write(tmp_path / FOLDERS.get(name, "data"), split, [{"question": "q", "else": 1}])
    with pytest.raises(
        EvaluationError, match=r"\.parquet: no column\(s\) \[.*'answers?'.*found \['question', 'else'\]"
    ):
        benchmark.items(tmp_path)


def test_questions_about_one_picture_share_its_bytes(tmp_path):
    gqa = get_benchmark("gqa").items(publish("gqa", tmp_path / "gqa"))
    assert gqa[0].images[0] is gqa[1].images[0]
    rows = [row | {"image": cell(png(8, 8, 3))} for row in ROWS["docvqa"]]
    write(tmp_path / "docvqa" / "DocVQA", "validation", rows)
    first, second = get_benchmark("docvqa").items(tmp_path / "docvqa")
    assert first.images[0] is second.images[0]


def test_gqa_without_pictures(tmp_path):
    rows = [*ROWS["gqa"], ROWS["gqa"][0] | {"imageId": "n9"}]
    publish("gqa", tmp_path, rows)
    items = get_benchmark("gqa").items(tmp_path)
    assert [item.problem for item in items[:2]] == [None, None]
    assert items[2].problem == "missing_image: imageId 'n9' is not in testdev_balanced_images"
    alone = get_benchmark("gqa").items(next((tmp_path / FOLDERS["gqa"]).glob("*.parquet")))
    assert alone[0].images == items[0].images
    for path in (tmp_path / IMAGES).iterdir():
        path.unlink()
    with pytest.raises(EvaluationError, match=r"no folder testdev_balanced_images; found \['testdev_balanced_instruct"):
        get_benchmark("gqa").items(tmp_path)


def test_the_configuration_is_chosen_among_several(tmp_path):
    docvqa = get_benchmark("docvqa")
    publish("docvqa", tmp_path)
    other = [row | {"image": cell(png(8, 8, 9))} for row in ROWS["docvqa"] * 2]
    write(tmp_path / "InfographicVQA", "validation", other)
    write(tmp_path / ".cache" / "DocVQA", "validation", other)
    assert len(docvqa.items(tmp_path)) == 2
    assert len(docvqa.items(tmp_path / "DocVQA")) == 2
    for path in (tmp_path / "DocVQA").iterdir():
        path.unlink()
    with pytest.raises(EvaluationError, match=r"no folder DocVQA; found \['InfographicVQA'\]"):
        docvqa.items(tmp_path)


def test_folders_side_by_side_are_told_apart_by_their_columns(tmp_path):
    publish("ai2d", tmp_path / "a")
    publish("ocrbench", tmp_path / "b")
    assert [item.question for item in get_benchmark("ai2d").items(tmp_path)] == ["q0", "q1"]
    publish("ai2d", tmp_path / "c")
    with pytest.raises(EvaluationError, match=r"several folders hold test-\*\.parquet: \['a/data', 'c/data'\]"):
        get_benchmark("ai2d").items(tmp_path)
    rows = [row | {k: cell(v) for k, v in pictures("mmmu", 0).items()} for row in ROWS["mmmu"]]
    for subject, row in zip(("Art", "Math"), rows, strict=True):
        write(tmp_path / "mmmu" / subject, "validation", [row])
    assert [item.category for item in get_benchmark("mmmu").items(tmp_path / "mmmu")] == ["Art_Theory", "Math"]


def test_a_download_that_broke_off_is_refused(tmp_path):
    publish("ai2d", tmp_path)
    next(tmp_path.rglob("test-00001-of-00002.parquet")).unlink()
    with pytest.raises(EvaluationError, match=r"1 of 2 parquet files are there; missing numbers \[1\]"):
        get_benchmark("ai2d").items(tmp_path)


def test_the_hubs_own_conversion_and_raw_bytes_are_read(tmp_path):
    rows = [row | {"image": png(8, 8, i)} for i, row in enumerate(ROWS["ai2d"])]
    (tmp_path / "default" / "test").mkdir(parents=True)
    pq.write_table(table(rows), tmp_path / "default" / "test" / "0000.parquet")
    assert [item.images for item in get_benchmark("ai2d").items(tmp_path)] == [(row["image"],) for row in rows]


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
        folder = write_jsonl(name, tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", [ROWS[name][0] | changes])
        (item,) = get_benchmark(name).items(folder)
        return item.problem

    assert problem("docvqa", answers=[]) == "no_answer: the list of answers is empty"
    assert problem("mmmu", options="['a'").startswith("malformed_record: options: expected the text of a Python list")
    assert problem("mmmu", options="3").startswith("malformed_record: options: expected the text of a Python list")
    assert problem("mmmu", question="<image 5>?") == "missing_image: image_5: the row has no such picture"
    assert problem("mmmu", question_type="essay").endswith("expected multiple-choice or open, found 'essay'")
    assert problem("mme", answer="Maybe") == "malformed_record: answer: expected Yes or No, found 'Maybe'"
    assert problem("ai2d", answer="7") == "malformed_record: answer: expected an index of 4 choices, found 7"
    assert problem("ai2d", answer="x").endswith("expected a whole number, found 'x'")
    assert problem("scienceqa", answer=True).endswith("expected a whole number, found 'bool'")
    assert problem("ocrbench", answer="one text") is None


def test_mme_pairs(tmp_path):
    mme = get_benchmark("mme")
    records = [
        {"question_id": f"{i // 2}", "question": "q", "answer": "Yes", "category": category}
        for category in ("color", "code_reasoning")
        for i in range(4)
    ]
    items = [mme.item(str(i), record) for i, record in enumerate(records)]
    scores = [1.0, 1, 1, 0, 1, 1, 1, 1]
    assert mme.aggregate(items, scores) == {"mme_perception_score": 125, "mme_cognition_score": 200}
    estimates = mme.estimates(items, scores)
    assert statistics.value(estimates.overall) == pytest.approx(125 / 20)
    assert {name: statistics.value(strata) for name, strata in estimates.categories.items()} == {
        "color": 62.5,
        "code_reasoning": 100,
    }
    assert [len(stratum.values) for stratum in estimates.overall] == [2]
    # Without its partner a question is worth its accuracy, without the bonus.
    assert mme.aggregate(items[:1], [1.0]) == {"mme_perception_score": 100}
    assert mme.limited(items, 3) == items[:4]
    assert mme.limited(items[::4] + items[1::4], 1) == [items[0], items[1]]
    assert mme.limited(items, None) == items


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
    with pytest.raises(EvaluationError, match="are of different downloads, rows would count twice"):
        find_shards(tmp_path, Wanted("test"), ())
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "test-all.parquet")
    with pytest.raises(EvaluationError, match="are of different downloads"):
        find_shards(tmp_path, Wanted("test"), ())
    (tmp_path / "test-all.parquet").rename(tmp_path / "test-00001-of-00002-b.parquet")
    with pytest.raises(EvaluationError, match=r"'test-00001-of-00002-b\.parquet'.* are of different downloads"):
        find_shards(tmp_path, Wanted("test"), ())


@pytest.mark.parametrize("name", PAPER)
def test_a_column_that_every_row_of_a_jsonl_lacks_is_named(name, tmp_path):
    benchmark = get_benchmark(name)
    required = [column.name for column in benchmark.columns if not column.optional]
    for column in (*required, *list(pictures(name, 0))[:1]):
        folder = write_jsonl(name, tmp_path / column)
        path = next(folder.glob("*.jsonl"))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key != column} for row in rows]
        path.write_text("\n".join(map(json.dumps, kept)) + "\n[1]\n")
        with pytest.raises(
            EvaluationError, match=rf"jsonl: every row lacks column\(s\) \['{column}'\]; found columns \['"
        ):
            benchmark.items(folder)
        path.write_text("\n".join(map(json.dumps, [rows[0], *kept[1:]])))  # one has it: the other's problem
        assert [item.problem is None for item in benchmark.items(folder)] == [True, False]


def test_mmstar_weighs_fine_categories_alike():
    mmstar = get_benchmark("mmstar")
    kinds = [("math", "a"), ("math", "a"), ("math", "a"), ("math", "b"), ("perception", "c")]
    items = [mmstar.item(str(i), {"category": c, "l2_category": fine}) for i, (c, fine) in enumerate(kinds)]
    scores = [1.0, 0, 0, 1, 0]
    assert mmstar.aggregate(items, scores) == pytest.approx({"average": 4 / 9, "math": 2 / 3, "perception": 0})
    assert statistics.value(mmstar.estimates(items, scores).overall) == pytest.approx(400 / 9)
    # Without its coarse category a row counts in its fine one, and is no category of its own.
    items[2] = mmstar.item("2", {"l2_category": "a"})
    assert mmstar.aggregate(items, scores) == pytest.approx({"average": 4 / 9, "math": 3 / 4, "perception": 0})
    assert set(mmstar.estimates(items, scores).categories) == {"math", "perception"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("scienceqa", "scienceqa/test50.jsonl"),
        ("ai2d", "ai2d/samples.jsonl"),
        ("mmmu", "mmmu/samples.jsonl"),
        ("ocrbench", "ocr/ocr.jsonl"),
        ("ocrbench", "ocr/ocrbench_chartqa40.jsonl"),
    ],
)
def test_real_items(name, file):
    path = DATA_ROOT / file
    if not path.exists():
        pytest.skip(f"no real data at {path} (set VR_JAX_DATA)")
    benchmark = get_benchmark(name)
    items = benchmark.items(path)
    assert len(items) == len(path.read_text().splitlines())
    for item in items:
        assert item.problem is None
        assert all(image.is_file() for image in item.images)
        assert benchmark.score(item.answers[0], item) == 1
        assert "<image>" not in benchmark.prompt(item)


@needs_data("mmmu", "samples.jsonl")
def test_real_items_with_several_pictures():
    items = get_benchmark("mmmu").items(DATA_ROOT / "mmmu" / "samples.jsonl")
    for item in items:
        assert len(item.images) == len(get_benchmark("mmmu").image_names(item)) > 0
