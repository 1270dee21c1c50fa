"""Puts the page together. It opens from disk with no network: everything is inside, and its policy forbids more."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vr_jax.evaluation.paper_scores import PaperRow
from vr_jax.evaluation.report.cards import MAX_IMAGES, WORDS, Images, card, segments
from vr_jax.evaluation.report.heat import legend
from vr_jax.evaluation.report.images import IMAGE_LEVELS, MAP_LEVELS, Embedded, Source, embed, key_of
from vr_jax.evaluation.report.items import ReportItem
from vr_jax.evaluation.report.plots import loss_curve, score_plot
from vr_jax.evaluation.report.scores import RunScores
from vr_jax.evaluation.report.tables import benchmark_table, headline, paper_table
from vr_jax.evaluation.report.text import SHOWN, escape, number
from vr_jax.storage import write_bytes

FOLDER = Path(__file__).parent
MAX_BYTES = 29_000_000  # of the page; texts become shorter and images smaller before it is exceeded
_TEXT_SHARE = 0.7  # of the page, at most for what is neither image nor map
_LENGTHS = (SHOWN, SHOWN // 4, SHOWN // 20)  # of long texts
_MAP_SHARE = 0.3  # of what is left for images and maps, at most for maps
_ENCODED = 3 / 4  # bytes of a file per byte of its base64

_Items = Sequence[ReportItem]
_ByKey = Mapping[str, Embedded]
_Frame = Callable[[str, str], str]
_Page = Callable[[_ByKey, _ByKey], bytes]  # of images and maps


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    items: Sequence[ReportItem],
    losses: Sequence[tuple[int, float]] = (),
    settings: Mapping[str, object] | None = None,
    paper_rows: Sequence[PaperRow] = (),
    max_bytes: int = MAX_BYTES,
) -> None:
    """Writes the page; the file appears only when complete.

    summary: scores 0..100 as in the run's summary.json: `benchmarks` by name (`title`, `group`, `score`, `interval`,
    `items`, `unscored`, `categories`; `baseline` if there is one), and the paper's `groups` and `average` where they
    are complete. items: those to show; their `benchmark` is a name of the summary. losses: (step, loss) of a training
    run. settings: shown as they are. paper_rows: the paper's rows that the model is (`paper_scores.rows_of`).
    max_bytes: of the page; for it long texts are cut shorter, then items left out, and images scaled down.
    Raises ValueError for a summary that lacks something, OSError if the page cannot be written."""
    run = RunScores.from_summary(summary)
    titles = {one.name: one.title for one in run.benchmarks}
    for shown, length in _versions(items):
        frame = _frame(title, run, shown, losses, settings or {}, paper_rows)
        page = _with_cards(frame, shown, titles, length)
        sources = _sources(shown)
        rest = _without_images(page, *sources)
        if rest <= _TEXT_SHARE * max_bytes:
            break
    write_bytes(path, page(*_embedded(*sources, max_bytes - rest)))


def _with_cards(frame: _Frame, items: _Items, titles: Mapping[str, str], length: int) -> _Page:
    def page(images: _ByKey, maps: _ByKey) -> bytes:
        store = Images(images, maps)
        cards = "\n".join(card(item, place, store, titles, length) for place, item in enumerate(items))
        return frame("items", cards).encode()

    return page


def _versions(items: _Items) -> Iterator[tuple[_Items, int]]:
    """The items of the page and the length of its texts, best first."""
    for length in _LENGTHS:
        yield items, length
    while items:
        items = items[1::2]
        yield items, _LENGTHS[-1]


def _sources(items: _Items) -> tuple[dict[str, Source], dict[str, Source]]:
    """Images and maps by key."""
    images = {key_of(source): source for item in items for source in item.images[:MAX_IMAGES]}
    maps: dict[str, Source] = {key_of(heat.png): heat.png for item in items if item.images for heat in item.maps}
    return images, maps


def _without_images(page: _Page, images: Mapping[str, Source], maps: Mapping[str, Source]) -> int:
    """Bytes of the page, at most, that are neither image nor map."""
    # Stand-ins for what is not known yet: the longest of sizes, problems and ends of base64.
    blank = Embedded(b"-", "image/webp", (10**6, 10**6))
    problem = Embedded(problem="-" * 340)
    longest = max(len(page(dict.fromkeys(images, one), dict.fromkeys(maps, one))) for one in (blank, problem))
    return longest + 4 * (len(images) + len(maps))


def _embedded(
    images: Mapping[str, Source], maps: Mapping[str, Source], room: int
) -> tuple[dict[str, Embedded], dict[str, Embedded]]:
    """Images and maps by key, in `room` bytes of the page."""
    left = max(0, room) * _ENCODED
    small = embed(maps, int(left * _MAP_SHARE), MAP_LEVELS)
    spent = sum(len(one.data) for one in small.values())
    return embed(images, int(left) - spent, IMAGE_LEVELS), small


def _frame(
    title: str,
    run: RunScores,
    items: Sequence[ReportItem],
    losses: Sequence[tuple[int, float]],
    settings: Mapping[str, object],
    paper_rows: Sequence[PaperRow],
) -> _Frame:
    """The page with everything but one part, which the returned function fills in."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    curve = loss_curve(losses) if losses else ""
    parts = {
        "script-hash": f"sha256-{digest}",
        "style": style,
        "script": script,
        "title": escape(title),
        "headline": headline(run),
        "paper": paper_table(run, paper_rows),
        "benchmarks": benchmark_table(run) if len(run.benchmarks) > 1 or run.of_the_paper else "",
        "categories": "".join(map(score_plot, run.benchmarks)),
        "curve": f'<section id="curve"><h2>Training loss</h2>{curve}</section>' if curve else "",
        "total": _total(run, items),
        "controls": _controls(run, items),
        "settings": "\n".join(
            f'<dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd>' for name, value in settings.items()
        ),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")

    def filled(name: str, text: str) -> str:
        known = {**parts, name: text}
        return re.sub(r"<!--([a-z-]+)-->", lambda match: known[match[1]], template)

    return filled


def _total(run: RunScores, items: Sequence[ReportItem]) -> str:
    if not items:
        return "This page shows no items."
    names = {item.benchmark for item in items}
    total = sum(one.overall.items or 0 for one in run.benchmarks if one.name in names)
    text = f"All {number(len(items))} items."
    if len(items) < total:
        text = f"{number(len(items))} of {number(total)} items are on this page, evenly spaced."
    others = ", ".join(one.title for one in run.benchmarks if one.name not in names)
    return f"{text} Scores only: {escape(others)}." if others else text


def _controls(run: RunScores, items: Sequence[ReportItem]) -> str:
    counts = Counter(item.state for item in items)
    states = [("", f"all {number(len(items))}")]
    states += [(state, f"{WORDS[state]} {number(count)}") for state in WORDS if (count := counts[state])]
    shown = Counter(item.benchmark for item in items)
    titles = {one.name: one.title for one in run.benchmarks}
    benchmarks = "".join(
        f'<option value="{escape(name)}">{escape(titles.get(name, name))} ({number(count)})</option>'
        for name, count in shown.items()
    )
    benchmark = f'<select id="benchmark"><option value="">all</option>{benchmarks}</select>'
    hidden = " hidden" if len(shown) < 2 else ""
    labels = list(dict.fromkeys(heat.label for item in items if item.images for heat in item.maps))
    heat = ""
    if labels:
        choices = [("", "image"), *((label, label) for label in labels)]
        switch = segments("maps", "heat maps of all items", choices)
        heat = f'<div class="row"><span>re-read</span>{switch}{legend()}</div>'
    return (
        f'<div class="row">{segments("state", "show", states, "states")}'
        f"<label{hidden}>benchmark {benchmark}</label>"
        '<label>category <select id="category"></select></label>'
        '<label class="search"><span class="hidden">search</span>'
        '<input id="search" type="search" placeholder="search in texts" autocomplete="off" spellcheck="false"></label>'
        f'<span id="count" role="status"></span></div>{heat}'
    )
