"""An item as a card: image with heat maps, question, references, prediction, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vr_jax.evaluation.report.heat import HeatMap
from vr_jax.evaluation.report.images import Embedded, key_of
from vr_jax.evaluation.report.items import ReportItem, State
from vr_jax.evaluation.report.text import NAME, SHOWN, escape, short_name, shortened

MAX_IMAGES = 8  # of one item
MAX_REFERENCES = 20
_SMALL = 240  # pixels; images that fit into this square twice are enlarged
WORDS: dict[State, str] = {
    "right": "✓ right",
    "partial": "◐ partly right",
    "wrong": "✕ wrong",
    "unscored": "! not scored",
}


class Images:
    """The embedded images and maps by key; each is written into the page once, where it is shown first."""

    def __init__(self, images: Mapping[str, Embedded], maps: Mapping[str, Embedded]):
        self._images, self._maps = images, maps
        self._written: dict[str, str] = {}

    def image(self, source_key: str) -> tuple[Embedded, str]:
        """The image and the attribute that shows it: `src`, or `data-same` naming the element that has it."""
        one = self._images[source_key]
        if one.problem is not None:
            return one, ""
        if source_key in self._written:
            return one, f'data-same="{self._written[source_key]}"'
        name = self._written[source_key] = f"p{len(self._written)}"
        return one, f'id="{name}" src="{one.url}"'

    def heat(self, png: bytes) -> Embedded:
        return self._maps[key_of(png)]


def card(item: ReportItem, number: int, images: Images, titles: Mapping[str, str], shown: int = SHOWN) -> str:
    """titles: of benchmarks, by name. shown: characters of a longer text that are shown."""
    state, category = item.state, short_name(item.category)
    benchmark = titles.get(item.benchmark, item.benchmark)
    score = f" {item.score:.2f}" if state == "partial" else ""
    cut = '<span class="pill soft">cut off at the token limit</span>' if item.cut_off else ""
    places = " · ".join(f"<bdi>{escape(text)}</bdi>" for text in (benchmark, category) if text)
    error = ""
    if item.error is not None:
        error = f'<dt>problem</dt><dd class="error">{shortened(item.error, min(500, shown))}</dd>'
    return (
        f'<article class="item {state}" data-state="{state}" data-benchmark="{escape(item.benchmark)}" '
        f'data-category="{escape(category)}">{_figure(item, number, images)}'
        f'<div class="text"><p class="head"><span class="pill {state}">{WORDS[state]}{score}</span>{cut}'
        f'<span class="place">{places}</span></p>'
        f'<p class="question" dir="auto">{shortened(item.question, shown)}</p>'
        f'<dl><dt>expected</dt><dd dir="auto">{_references(item.references, min(300, shown))}</dd>'
        f'<dt>answered</dt><dd class="answer" dir="auto">{_prediction(item.prediction, shown)}</dd>'
        f"{error}<dt>score</dt><dd>{item.score:.2f}</dd></dl>"
        f'<p class="id">{shortened(item.id, NAME)}</p></div></article>'
    )


def _references(references: Sequence[str], length: int) -> str:
    shown = [f"<bdi>{shortened(text, length)}</bdi>" for text in references[:MAX_REFERENCES]]
    more = len(references) - MAX_REFERENCES
    rest = f' <small class="cut">and {more} more</small>' if more > 0 else ""
    return ' <span class="or">/</span> '.join(shown) + rest or '<em class="none">(none)</em>'


def _prediction(prediction: str | None, length: int) -> str:
    if prediction is None:
        return '<em class="none">(not asked)</em>'
    return shortened(prediction, length) if prediction.strip() else '<em class="none">(empty)</em>'


def _figure(item: ReportItem, number: int, images: Images) -> str:
    if not item.images:
        return ""
    shown = item.images[:MAX_IMAGES]
    parts = []
    for place, source in enumerate(shown):
        heat = "".join(_heat(one, images) for one in item.maps) if place == 0 else ""
        label = f"Enlarge the image of {item.id[:NAME]}" if len(shown) == 1 else f"Enlarge image {place + 1}"
        parts.append(_image(images, source_key=key_of(source), label=label, heat=heat))
    more = len(item.images) - len(shown)
    rest = f'<p class="note">and {more} more images</p>' if more > 0 else ""
    several = " several" if len(shown) > 1 else ""
    return f'<figure class="images{several}">{"".join(parts)}{_switch(item, number)}{rest}</figure>'


def _image(images: Images, source_key: str, label: str, heat: str) -> str:
    embedded, source = images.image(source_key)
    if embedded.problem is not None:
        return f'<p class="broken">image cannot be shown: {shortened(embedded.problem, 300)}</p>'
    width, height = embedded.size
    times = max(1, _SMALL // max(width, height))
    small = f' class="small" style="width:{times * width}px"' if times > 1 else ""
    return (
        f'<button type="button" class="zoom" aria-label="{escape(label)}"><span class="stack">'
        f'<img{small} alt="" decoding="async" width="{times * width}" height="{times * height}" {source}>{heat}'
        "</span></button>"
    )


def _heat(one: HeatMap, images: Images) -> str:
    embedded = images.heat(one.png)
    if embedded.problem is None:
        return (
            f'<img class="map" alt="" decoding="async" data-label="{escape(one.label)}" '
            f'data-note="{escape(one.note[:500])}" src="{embedded.url}" hidden>'
        )
    note = f"heat map cannot be shown: {embedded.problem}"
    return f'<i class="map" data-label="{escape(one.label)}" data-note="{escape(note)}" hidden></i>'


def _switch(item: ReportItem, number: int) -> str:
    if not item.maps:
        return ""
    choices = [("", "image"), *((heat.label, heat.label) for heat in item.maps)]
    return f'{segments(f"map{number}", "what was re-read", choices)}<p class="note heatnote" aria-live="polite"></p>'


def segments(name: str, label: str, choices: Sequence[tuple[str, str]], style: str = "") -> str:
    """A row of exclusive choices: (value, text); the first one is chosen."""
    options = "".join(
        f'<label><input type="radio" name="{name}" value="{escape(value)}"{" checked" if place == 0 else ""}>'
        f"<span>{escape(text)}</span></label>"
        for place, (value, text) in enumerate(choices)
    )
    return f'<div class="segments {style}" role="radiogroup" aria-label="{escape(label)}">{options}</div>'
