"""The report page: complete, self-contained, escaped, within its size."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.report_pages import HOSTILE, encoded, heat, items, noise, plain, summary
from tests.golden.discovery import DATA_ROOT, needs_data
from vr_jax.evaluation.paper_scores import PaperRow
from vr_jax.evaluation.report import (
    HeatMap,
    ReportItem,
    heat_png,
    score_rows,
    with_baselines,
    write_report,
)
from vr_jax.evaluation.report.images import MAP_LEVELS, embed, key_of, largest_share
from vr_jax.evaluation.report.plots import loss_curve


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = (PaperRow("table5b", "global", "0.5b"),)
    losses = [(step, 4.0 / step) for step in range(1, 200)]
    write_report(
        path,
        title="A & B",
        summary=summary(),
        items=items(),
        losses=losses,
        settings={"steps": 199, "name": HOSTILE},
        paper_rows=rows,
    )
    assert list(path.parent.iterdir()) == [path]
    return path.read_bytes().decode("utf-8", errors="strict")


def test_texts_are_escaped_and_shown(page):
    assert page.count("<article") == 7
    assert [page.count(f'data-state="{state}"') for state in ("right", "partial", "wrong", "unscored")] == [2, 1, 3, 1]
    assert "A &amp; B" in page
    assert "<b>bars</b>" not in page
    assert "Own &lt;b&gt;" in page
    assert 'data-category="say &#34;x&#34;"' in page
    assert page.count("<script") == 1
    assert "onerror='" not in page
    assert "&lt;!--items--&gt;" in page
    assert not re.findall(r"\{[{%#]|[%#}]\}", page.split("<style>")[0] + page.split("</style>")[1].split("<script>")[0])
    assert "nul\u2400 escape\u241b[31m half\ufffd" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe]", page)
    assert "the first 2,000 of 500,000 characters" in page
    assert "(empty)" in page
    assert "(not asked)" in page
    assert "broken_image: cut" in page
    assert page.count("cut off at the token limit") == 1
    assert "This page shows 7 of 3,404 items, evenly spaced." in page


def test_images(page):
    assert page.count("The image cannot be shown: broken_image: The image of 4 bytes has none of the formats PNG,") == 1
    assert page.count("data-same=") == 1, "the shared image is there once"
    assert "and 1 more images" in page
    assert len(re.findall(r'<img class="map"', page)) == 4
    assert len(re.findall(r'<img (?:class="small" style="width:\d+px" )?alt=""', page)) == 3 + 8


def test_self_contained(page):
    urls = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(url.startswith("data:") for url in urls)
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_scores_beside_the_paper(page):
    paper = page[page.index('<section id="paper">') : page.index("<details>")]
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr.*?</tr>", paper)]
    assert len(rows) == 1 + 1 + 1 + 6  # head, own, the model's row, baseline and method at three sizes
    assert "This run||Qwen2-0.5B" in rows[1]
    assert rows[1].count("\N{EN DASH}") == 4
    assert "Global||Qwen2-0.5B||54.1||43.3||36.4||43.7||Table 5b" in rows[2]
    assert (
        "2 of 11 benchmarks were run: General 0 of 3; Knowledge 1 of 4 (MMMU); OCR&amp;Chart 1 of 4 (ChartQA)" in page
    )
    assert page[page.index("<details>") :].count("Table 4") == 18 + 1
    for text in ("40.1", "38.1\N{EN DASH}43.1", "2,500", "3 broken image"):
        assert text in page


def test_complete_groups_and_average(tmp_path):
    found = summary()
    found["groups"]["Knowledge"] = estimate = {"score": 44.44, "interval": [44.0, 45.0], "benchmarks": []}
    found["average"] = {**estimate, "score": 47.77}
    write_report(tmp_path / "r.html", title="t", summary=found, items=[])
    text = (tmp_path / "r.html").read_text()
    own = re.search(r'<tr class="own">.*?</tr>', text)[0]
    assert "44.4<small>44.0\N{EN DASH}45.0" in own
    assert "47.8<small>" in own
    assert "benchmarks were run" not in text
    assert "This page shows no items." in text


def test_benchmarks_without_items_on_the_page_are_named(tmp_path):
    """Earlier benchmarks of the folder are in the summary only."""
    shown = [one for one in items() if one.benchmark == "mmmu_val"]
    write_report(tmp_path / "r.html", title="t", summary=summary(), items=shown)
    text = (tmp_path / "r.html").read_text()
    assert "This page shows 3 of 900 items, evenly spaced. It shows only the scores of ChartQA, Own &lt;b&gt;." in text
    write_report(
        tmp_path / "r.html", title="t", summary=summary(), items=[dataclasses.replace(shown[0], benchmark="own")] * 4
    )
    assert (
        "This page shows all 4 items. It shows only the scores of ChartQA, MMMU." in (tmp_path / "r.html").read_text()
    )


def test_bars_are_to_scale(page):
    bar = page[page.index("Subject_<wbr>20") :]
    assert re.search(r'<rect x="0" y="1.5" width="([\d.]+)"', bar)[1] == "60.00"
    assert re.search(r'd="M([\d.]+) 6H([\d.]+)"', bar).groups() == ("58.00", "63.00")
    assert 'aria-label="score 60.0, 95 % interval 58.0 to 63.0"' in bar
    assert len(re.findall(r'<figure class="plot">', page)) == 3


def test_no_paper_rows_for_benchmarks_of_no_group(tmp_path):
    one = [ReportItem("a", "kind", "?", ("3",), "3", 0.5, (b"no image",), "demo")]
    found = {"benchmarks": {"demo": {"title": "Demo", "score": 50.0, "items": 1, "categories": {}}}}
    found = with_baselines(found, "demo", score_rows(one))
    assert found["benchmarks"]["demo"]["baseline"] == 100
    write_report(tmp_path / "r.html", title="t", summary=found, items=one)
    text = (tmp_path / "r.html").read_text()
    assert "Beside the paper" not in text
    assert "most frequent answer 100.0</small><small>0.5 times as high" in text


def test_a_summary_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="summary of the run cannot be read: KeyError: 'score'"):
        write_report(tmp_path / "r.html", title="t", summary={"benchmarks": {"a": {}}}, items=[])
    assert list(tmp_path.iterdir()) == []


def test_loss_curve_is_to_scale():
    curve = loss_curve([(1, 10.0), (2, 1.0), (3, 0.1)], width=100, height=100)
    assert curve is not None
    points = [tuple(map(float, pair.split(","))) for pair in curve.each.split()]
    # One decade per step: equal distances in both directions.
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.11)
    assert points[1][1] > points[0][1]
    assert loss_curve([]) is None


def test_scores_beside_the_best_constant_answer():
    answers = [("chart", ("3", "three"), 1.0), ("chart", ("3",), 0.5), ("word", ("a",), 0.0), ("word", ("3",), 1.0)]
    shown = [ReportItem(str(i), kind, "?", refs, "x", score) for i, (kind, refs, score) in enumerate(answers)]
    rows = [(row.name, row.count, row.score, row.baseline) for row in score_rows(shown)]
    assert rows == [("all", 4, 0.625, 0.75), ("chart", 2, 0.75, 1.0), ("word", 2, 0.5, 0.5)]
    with pytest.raises(ValueError, match="no items"):
        score_rows([])


# --- images and their budget


def test_small_files_are_kept_and_large_ones_share_what_is_left():
    sources = {"small": plain(96, 96), "wide": plain(2000, 100)} | {str(n): noise(n, 300) for n in range(4)}
    found = embed(sources, budget := 40_000)
    assert found["small"].data == sources["small"], "without loss"
    assert sum(len(one.data) for one in found.values()) <= budget
    assert [one.problem for one in found.values()] == [None] * 6
    assert found["wide"].size == (2000, 100)
    assert sum(len(one.data) for one in found.values()) > budget / 4
    assert embed({"a": noise(0, 300)}, 10)["a"].problem == "the page has no room for it"


@pytest.mark.parametrize(("sizes", "budget", "share"), [([1, 2, 30, 40], 23, 10), ([5, 5], 100, 5), ([9, 9], 9, 4)])
def test_largest_share(sizes, budget, share):
    assert largest_share(sizes, budget) == share
    assert sum(min(size, share) for size in sizes) <= budget


def test_images_are_shown_as_the_model_sees_them():
    """Neither turned by EXIF nor see-through, which browsers would do with the files as they are."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    sources = {
        "turned": encoded(pixels, "JPEG", exif=turned.tobytes()),
        "clear": encoded(np.zeros((20, 40, 4), np.uint8)),
        "deep": encoded(np.zeros((20, 40), np.uint16)),
        "bmp": encoded(pixels, "BMP"),
    }
    for name, one in embed(sources, 10**6).items():
        assert (one.mime, one.size) == ("image/webp", (40, 20)), name


def test_heat_colours_follow_the_weight(tmp_path):
    ratios = np.array([[1.0, 0.25, 4.0, 0.0, 1000.0, np.nan]])
    (tmp_path / "h.png").write_bytes(heat_png(ratios))
    with Image.open(tmp_path / "h.png") as image:
        uniform, less, more, none, most, outside = (image.convert("RGBA").getpixel((k, 0)) for k in range(6))
    assert uniform[3] == outside[3] == 0
    assert less == none
    assert less[2] > less[0]
    assert more == most
    assert more[0] > more[2]
    with pytest.raises(ValueError, match=r"non-negative weights of shape \(H, W\)"):
        heat_png(np.array([[1.0, -0.5]]))


def test_large_maps_become_coarser():
    png = encoded(np.random.default_rng(0).integers(0, 256, (200, 200, 4), dtype=np.uint8))
    (one,) = embed({"a": png}, 20_000, MAP_LEVELS).values()
    assert one.problem is None
    assert len(one.data) <= 20_000


def test_worst_case_keeps_to_the_size(tmp_path):
    limit = 500_000
    shown = [
        ReportItem(str(n), "c", "?", ("a",), '"' * 3000, 0.0, (noise(n, 400),), maps=(HeatMap("1", heat(n, (60, 60))),))
        for n in range(12)
    ]
    write_report(tmp_path / "r.html", title="t", summary={"benchmarks": {}}, items=shown, max_bytes=limit)
    text = (tmp_path / "r.html").read_text()
    assert limit / 3 < len(text.encode()) <= limit
    assert text.count("<img") == 24
    assert "cannot be shown" not in text


@pytest.mark.parametrize(
    ("count", "limit", "length", "all_of_them"),
    [
        (12, 2_000_000, "2,000", True),
        (12, 900_000, "500", True),
        (12, 400_000, "100", True),
        (50, 400_000, "100", False),
    ],
)
def test_texts_alone_keep_to_the_size(tmp_path, count, limit, length, all_of_them):
    """Texts get shorter first, and only then items are left out; images keep some room."""
    hostile = '"' * 3000
    shown = [
        ReportItem(str(n), hostile + str(n), hostile, (hostile,) * 30, hostile, 0.0, (plain(9, 9),), error=hostile)
        for n in range(count)
    ]
    write_report(tmp_path / "r.html", title="t", summary={"benchmarks": {}}, items=shown, max_bytes=limit)
    text = (tmp_path / "r.html").read_text()
    assert len(text.encode()) <= limit
    assert f"(the first {length} of 3,000 characters)" in text
    shown = text.count("<article")
    assert shown == count if all_of_them else 12 <= shown < count
    assert "cannot be shown" not in text
    assert max(map(len, re.findall('data-category="([^"]*)"', text))) <= 200 * len("&#34;")


def test_one_image_has_one_key(tmp_path):
    (tmp_path / "a.png").write_bytes(plain(3, 3))
    assert key_of(plain(3, 3)) == key_of(plain(3, 3)) != key_of(plain(4, 3))
    assert key_of(tmp_path / "a.png") != key_of(tmp_path / "b.png")


@pytest.mark.slow
@needs_data("chartqa")
def test_500_real_charts_with_maps(tmp_path):
    folder = DATA_ROOT / "chartqa"
    records = [json.loads(line) for name in ("test", "train") for line in (folder / f"{name}.jsonl").open()][:500]
    shown = [
        ReportItem(str(n), one["type"], one["question"], (one["answer"],), "?" * 3000, 0.0, (folder / one["image"],))
        for n, one in enumerate(records)
    ]
    maps = [(HeatMap("1", heat(n, (72, 72))), HeatMap("4", heat(n + 500, (72, 72)))) for n in range(len(shown))]
    shown = [dataclasses.replace(one, maps=two) for one, two in zip(shown, maps, strict=True)]
    write_report(tmp_path / "r.html", title="t", summary={"benchmarks": {}}, items=shown)
    text = (tmp_path / "r.html").read_text()
    assert len(text.encode()) < 30_000_000
    assert text.count("<article") == 500
    assert "cannot be shown" not in text
