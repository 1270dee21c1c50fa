"""The report page: complete, self-contained, escaped; its filters work in a browser."""

import io
import re
import shutil
import subprocess

import pytest
from PIL import Image

from vr_jax.evaluation.report import ReportItem, ScoreRow, loss_curve, score_rows, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    large = folder / "large.png"
    large.write_bytes(png((2000, 100)))
    items = [
        ReportItem("a", "chart", "How many <b>bars</b>?", ("3",), "3", 1.0, png((8, 8))),
        ReportItem("b", "chart", "Which?", ("red", "crimson"), "<script>alert(1)</script><!--rows-->", 0.0, large),
        ReportItem("c", 'say "word"', "What?", ("x",), "y", 0.0),
    ]
    path = folder / "report.html"
    rows = [ScoreRow("accuracy", 3, 1 / 3, 0.1), ScoreRow("chart", 2, 0.5, 0.0)]
    losses = [(step, 4.0 / step) for step in range(1, 200)]
    write_report(path, title="A & B", rows=rows, items=items, losses=losses, settings={"steps": "199"})
    return path


def test_content(page):
    text = page.read_text()
    assert text.count("<article") == 3
    assert text.count('data-state="right"') == 1
    assert "33.3%" in text
    assert "3.3 times" in text
    assert "A &amp; B" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;!--rows--&gt;" in text
    assert "<b>bars</b>" not in text
    assert 'data-category="say &quot;word&quot;"' in text
    assert "red / crimson" in text
    assert not re.findall(r"<!--\w+-->", text)
    assert list(page.parent.glob("*.tmp")) == []


def test_self_contained(page):
    text = page.read_text()
    urls = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(urls) == 3  # two pictures, an empty icon
    assert all(url.startswith("data:") for url in urls)
    assert "http" not in text
    assert len(text) < 60_000  # the large picture was scaled down


def test_loss_curve_is_to_scale():
    svg = loss_curve([(1, 10.0), (2, 1.0), (3, 0.1)], width=100, height=100)
    each = re.search(r'points="([^"]+)" class="each"', svg)
    assert each is not None
    points = [tuple(map(float, pair.split(","))) for pair in each.group(1).split()]
    # One decade per step: equal distances in both directions.
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.11)
    assert points[1][1] > points[0][1]
    assert loss_curve([]) == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(page, tmp_path):
    script = """<script>
      const counts = [];
      const pick = (s, c) => { state.value = s; category.value = c; state.onchange();
        counts.push([...document.querySelectorAll("article")].filter(a => a.getClientRects().length > 0).length); };
      pick("", ""); pick("right", ""); pick("wrong", "chart"); pick("right", 'say "word"');
      const loaded = [...document.images].every(i => { i.loading = "eager"; return true; });
      Promise.all([...document.images].map(i => i.decode())).then(
        () => { document.title = "counts " + counts.join(",") + " pictures " + document.images.length; },
        error => { document.title = "failed " + error; });
    </script>"""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path}/profile"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title.group(1) == "counts 3,1,1,0 pictures 2"
    assert "CONSOLE" not in done.stderr


def test_scores_beside_the_best_constant_answer():
    answers = [("chart", ("3", "three"), 1.0), ("chart", ("3",), 0.5), ("word", ("a",), 0.0), ("word", ("3",), 1.0)]
    items = [ReportItem(str(i), kind, "?", refs, "x", score) for i, (kind, refs, score) in enumerate(answers)]
    rows = [(row.name, row.count, row.score, row.baseline) for row in score_rows(items)]
    assert rows == [("all", 4, 0.625, 0.75), ("chart", 2, 0.75, 1.0), ("word", 2, 0.5, 0.5)]
    with pytest.raises(ValueError, match="no items"):
        score_rows([])


def test_a_broken_picture_is_named(tmp_path):
    item = ReportItem("a", "chart", "?", ("3",), "3", 0.5, b"no picture")
    write_report(tmp_path / "r.html", title="t", rows=score_rows([item]), items=[item])
    text = (tmp_path / "r.html").read_text()
    assert "picture cannot be read" in text
    assert 'data-state="partial"' in text
