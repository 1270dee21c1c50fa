"""The page of a report, which contains its styles, its script and its images, and whose policy allows nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from os import PathLike
from typing import Any

import jinja2
from markupsafe import Markup

from vr_jax.evaluation.paper_scores import PaperRow
from vr_jax.evaluation.report import plots, tables
from vr_jax.evaluation.report.cards import MAX_IMAGES, WORDS, card_views, map_choices
from vr_jax.evaluation.report.comparison import Comparison
from vr_jax.evaluation.report.heat import GRADIENT
from vr_jax.evaluation.report.images import IMAGE_LEVELS, MAP_LEVELS, Embedded, Source, embed, key_of
from vr_jax.evaluation.report.items import ReportItem
from vr_jax.evaluation.report.scores import RunScores
from vr_jax.evaluation.report.text import NAME, SHOWN, thousands
from vr_jax.pages import page_environment
from vr_jax.storage import write_bytes

MAX_BYTES = 29_000_000  # The size of the page. Before it is exceeded, texts become shorter and images smaller.
_TEXT_SHARE = 0.7  # The largest share of the page for everything but images and heat maps.
_LENGTHS = (SHOWN, SHOWN // 4, SHOWN // 20)  # The numbers of characters to which long texts are shortened, in turn.
_MAP_SHARE = 0.3  # The largest share of heat maps in the bytes that are left for images and heat maps.
_ENCODED = 3 / 4  # The number of bytes of a file per byte of its base64 text.

_Items = Sequence[ReportItem]
_ByKey = Mapping[str, Embedded]


def write_report(
    path: str | PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any],
    items: Sequence[ReportItem],
    losses: Sequence[tuple[int, float]] = (),
    settings: Mapping[str, object] | None = None,
    paper_rows: Sequence[PaperRow] = (),
    comparison: Comparison | None = None,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Writes the page of a report. The file appears only when it is complete.

    If the page would be too large, long texts are shortened first, then items are left out, and images are scaled down.

    Args:
        path: The HTML file to write.
        title: The title of the page.
        summary: The overall summary of the run, with the fields that `RunScores.from_summary` reads.
        items: The items to show. Their `benchmark` is a name of a benchmark in the summary.
        losses: The steps and losses of a training run, which are plotted if there are any.
        settings: The settings of the run, which are shown as they are.
        paper_rows: The rows of the paper whose model was evaluated (see `paper_scores.rows_of`).
        comparison: What stands in the place of the scores of one run, if the page compares several runs.
        max_bytes: The largest size of the page.

    Raises:
        ValueError: The summary lacks a field.
        UserError: The file cannot be written.
    """
    run = RunScores.from_summary(summary)
    for shown, length in _versions(items):
        page = _Page(run, shown, length, title, losses, settings or {}, paper_rows, comparison)
        images, maps = page.sources()
        rest = page.size_without_images(images, maps)
        if rest <= _TEXT_SHARE * max_bytes:
            break
    write_bytes(path, page.render(*_embedded(images, maps, max_bytes - rest)))


class _Page:
    """A page for one choice of its items and of the length of its texts."""

    def __init__(
        self,
        run: RunScores,
        items: _Items,
        length: int,
        title: str,
        losses: Sequence[tuple[int, float]],
        settings: Mapping[str, object],
        paper_rows: Sequence[PaperRow],
        comparison: Comparison | None = None,
    ):
        self.template = "page.html" if comparison is None else "comparison.html"
        self.items = items
        self.length = length
        self.titles = {one.name: one.title for one in run.benchmarks}
        labels = list(dict.fromkeys(heat.label for item in items if item.images for heat in item.maps))
        self.parts: dict[str, Any] = {
            "title": title,
            "tiles": tables.headline(run),
            "paper": tables.paper_table(run, paper_rows),
            "benchmark_rows": tables.benchmark_table(run) if len(run.benchmarks) > 1 or run.of_the_paper else [],
            "plots": [plots.score_plot(one) for one in run.benchmarks],
            "curve": plots.loss_curve(losses),
            "total": _total(run, items) if comparison is None else comparison.items_note,
            "states": _states(items),
            "benchmark_choices": _benchmark_choices(items, self.titles),
            "map_choices": map_choices(labels) if labels else (),
            "gradient": GRADIENT,
            "settings": list(settings.items()),
            "comparison": comparison,
        }

    def render(self, images: _ByKey, maps: _ByKey) -> bytes:
        """Renders the page with embedded images and heat maps by key."""
        cards = card_views(self.items, images, maps, self.titles, self.length)
        return _template(self.template).render(cards=cards, **_assets(), **self.parts).encode()

    def sources(self) -> tuple[dict[str, Source], dict[str, Source]]:
        """Returns the images and the heat maps of the page by key."""
        images = {key_of(source): source for item in self.items for source in item.images[:MAX_IMAGES]}
        maps: dict[str, Source] = {
            key_of(heat.png): heat.png for item in self.items if item.images for heat in item.maps
        }
        return images, maps

    def size_without_images(self, images: Mapping[str, Source], maps: Mapping[str, Source]) -> int:
        """Returns an upper bound on the bytes of the page that are neither image nor heat map."""
        # The sizes and problems of the images are not known yet. The longest ones stand in for them.
        blank = Embedded(b"-", "image/webp", (10**6, 10**6))
        problem = Embedded(problem="-" * 340)
        pages = (self.render(dict.fromkeys(images, one), dict.fromkeys(maps, one)) for one in (blank, problem))
        # The base64 text of a file can end with up to four bytes more than the share of the file.
        return max(map(len, pages)) + 4 * (len(images) + len(maps))


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = page_environment("vr_jax.evaluation.report")
    environment.filters["thousands"] = thousands
    environment.globals["name_length"] = NAME
    return environment.get_template(name)


@functools.cache
def _assets() -> dict[str, Markup | str]:
    """Returns the style and the script of the page, which must not be escaped, and the hash of the script."""
    folder = resources.files("vr_jax.evaluation.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": Markup(f"sha256-{digest}")}


def _versions(items: _Items) -> Iterator[tuple[_Items, int]]:
    """Yields the items of the page and the length of its texts, from the best version to the smallest."""
    for length in _LENGTHS:
        yield items, length
    while items:
        items = items[1::2]
        yield items, _LENGTHS[-1]


def _embedded(
    images: Mapping[str, Source], maps: Mapping[str, Source], room: int
) -> tuple[dict[str, Embedded], dict[str, Embedded]]:
    """Returns the images and heat maps by key, such that they take at most `room` bytes of the page."""
    left = max(0, room) * _ENCODED
    small = embed(maps, int(left * _MAP_SHARE), MAP_LEVELS)
    spent = sum(len(one.data) for one in small.values())
    return embed(images, int(left) - spent, IMAGE_LEVELS), small


def _total(run: RunScores, items: _Items) -> str:
    if not items:
        return "This page shows no items."
    names = {item.benchmark for item in items}
    total = sum(one.overall.items or 0 for one in run.benchmarks if one.name in names)
    text = f"This page shows all {thousands(len(items))} items."
    if len(items) < total:
        text = f"This page shows {thousands(len(items))} of {thousands(total)} items, evenly spaced."
    others = ", ".join(one.title for one in run.benchmarks if one.name not in names)
    return f"{text} It shows only the scores of {others}." if others else text


def _states(items: _Items) -> list[tuple[str, str]]:
    counts = Counter(item.state for item in items)
    states = [("", f"all {thousands(len(items))}")]
    return states + [(state, f"{WORDS[state]} {thousands(count)}") for state in WORDS if (count := counts[state])]


def _benchmark_choices(items: _Items, titles: Mapping[str, str]) -> list[tuple[str, str]]:
    shown = Counter(item.benchmark for item in items)
    return [(name, f"{titles.get(name, name)} ({thousands(count)})") for name, count in shown.items()]
