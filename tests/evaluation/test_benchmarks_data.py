"""Every benchmark's data: the published parquet layout and JSONL give the same items."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from tests.evaluation.published import (
    CATEGORIES,
    FOLDERS,
    IMAGES,
    ROWS,
    cell,
    images,
    publish,
    table,
    write,
    write_jsonl,
)
from tests.golden.discovery import DATA_ROOT, needs_data
from tests.inference.tiny import png
from vr_jax.errors import UserError
from vr_jax.evaluation import bootstrap
from vr_jax.evaluation.benchmarks import PAPER, get_benchmark


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
        expected = [content for content in images(name, i).values() if content is not None]
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
    assert all(bootstrap.value(strata) == pytest.approx(100) for strata in estimates.categories.values())
    overall = {"mme": 10, "ocrbench": 0.2}.get(name, 100)  # one of ten categories; two of a thousand
    assert bootstrap.value(estimates.overall) == pytest.approx(overall)


def test_questions_about_one_image_share_its_bytes(tmp_path):
    gqa = get_benchmark("gqa").items(publish("gqa", tmp_path / "gqa"))
    assert gqa[0].images[0] is gqa[1].images[0]
    rows = [row | {"image": cell(png(8, 8, 3))} for row in ROWS["docvqa"]]
    write(tmp_path / "docvqa" / "DocVQA", "validation", rows)
    first, second = get_benchmark("docvqa").items(tmp_path / "docvqa")
    assert first.images[0] is second.images[0]


def test_gqa_without_images(tmp_path):
    rows = [*ROWS["gqa"], ROWS["gqa"][0] | {"imageId": "n9"}]
    publish("gqa", tmp_path, rows)
    items = get_benchmark("gqa").items(tmp_path)
    assert [item.problem for item in items[:2]] == [None, None]
    assert items[2].problem == "missing_image: imageId 'n9' is not in testdev_balanced_images"
    alone = get_benchmark("gqa").items(next((tmp_path / FOLDERS["gqa"]).glob("*.parquet")))
    assert alone[0].images == items[0].images
    for path in (tmp_path / IMAGES).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no folder testdev_balanced_images; found \['testdev_balanced_instruct"):
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
    with pytest.raises(UserError, match=r"no folder DocVQA; found \['InfographicVQA'\]"):
        docvqa.items(tmp_path)


def test_folders_side_by_side_are_told_apart_by_their_columns(tmp_path):
    publish("ai2d", tmp_path / "a")
    publish("ocrbench", tmp_path / "b")
    assert [item.question for item in get_benchmark("ai2d").items(tmp_path)] == ["q0", "q1"]
    publish("ai2d", tmp_path / "c")
    with pytest.raises(UserError, match=r"several folders hold test-\*\.parquet: \['a/data', 'c/data'\]"):
        get_benchmark("ai2d").items(tmp_path)
    rows = [row | {k: cell(v) for k, v in images("mmmu", 0).items()} for row in ROWS["mmmu"]]
    for subject, row in zip(("Art", "Math"), rows, strict=True):
        write(tmp_path / "mmmu" / subject, "validation", [row])
    assert [item.category for item in get_benchmark("mmmu").items(tmp_path / "mmmu")] == ["Art_Theory", "Math"]


def test_the_hubs_own_conversion_and_raw_bytes_are_read(tmp_path):
    rows = [row | {"image": png(8, 8, i)} for i, row in enumerate(ROWS["ai2d"])]
    (tmp_path / "default" / "test").mkdir(parents=True)
    pq.write_table(table(rows), tmp_path / "default" / "test" / "0000.parquet")
    assert [item.images for item in get_benchmark("ai2d").items(tmp_path)] == [(row["image"],) for row in rows]


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
    assert bootstrap.value(estimates.overall) == pytest.approx(125 / 20)
    assert {name: bootstrap.value(strata) for name, strata in estimates.categories.items()} == {
        "color": 62.5,
        "code_reasoning": 100,
    }
    assert [len(stratum.values) for stratum in estimates.overall] == [2]
    # Without its partner a question is worth its accuracy, without the bonus.
    assert mme.aggregate(items[:1], [1.0]) == {"mme_perception_score": 100}
    assert mme.limited(items, 3) == items[:4]
    assert mme.limited(items[::4] + items[1::4], 1) == [items[0], items[1]]
    assert mme.limited(items, None) == items


def test_mmstar_weighs_fine_categories_alike():
    mmstar = get_benchmark("mmstar")
    kinds = [("math", "a"), ("math", "a"), ("math", "a"), ("math", "b"), ("perception", "c")]
    items = [mmstar.item(str(i), {"category": c, "l2_category": fine}) for i, (c, fine) in enumerate(kinds)]
    scores = [1.0, 0, 0, 1, 0]
    assert mmstar.aggregate(items, scores) == pytest.approx({"average": 4 / 9, "math": 2 / 3, "perception": 0})
    assert bootstrap.value(mmstar.estimates(items, scores).overall) == pytest.approx(400 / 9)
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
def test_real_items_with_several_images():
    items = get_benchmark("mmmu").items(DATA_ROOT / "mmmu" / "samples.jsonl")
    for item in items:
        assert len(item.images) == len(get_benchmark("mmmu").image_names(item)) > 0
