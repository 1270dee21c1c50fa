"""One self-contained HTML page of a run: scores, loss curve, and every item with its picture.

The page opens from disk with no network: pictures are embedded, the plot is inline SVG, the filters are a few lines of
plain JavaScript."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SIDE = 640  # pixels; larger pictures are scaled down in the page


@dataclass(frozen=True)
class ReportItem:
    """One question with what the model said. `score` is 0..1; `image` the encoded picture, if there is one."""

    id: str
    category: str
    question: str
    references: tuple[str, ...]
    prediction: str
    score: float
    image: bytes | Path | None = None


@dataclass(frozen=True)
class ScoreRow:
    """One row of the score table: shares 0..1; `baseline` is the majority answer's."""

    name: str
    count: int
    score: float
    baseline: float | None = None


def score_rows(items: Sequence[ReportItem]) -> list[ScoreRow]:
    """All items together, then each category, beside the accuracy of always giving its most frequent reference.

    Raises ValueError without items."""
    if not items:
        raise ValueError("no items to score")

    def row(name: str, members: Sequence[ReportItem]) -> ScoreRow:
        accepted = Counter(reference for item in members for reference in set(item.references))
        score = sum(item.score for item in members) / len(members)
        return ScoreRow(name, len(members), score, max(accepted.values(), default=0) / len(members))

    categories = sorted({item.category for item in items})
    groups = {name: [item for item in items if item.category == name] for name in categories}
    return [row("all", items), *(row(name, members) for name, members in groups.items())]


def write_report(
    path: Path,
    *,
    title: str,
    rows: Sequence[ScoreRow],
    items: Sequence[ReportItem],
    losses: Sequence[tuple[int, float]] = (),
    settings: Mapping[str, str] | None = None,
) -> None:
    """Writes the page; the file appears only when complete.

    rows: the first one is the headline. losses: (step, loss). settings: shown as they are. All text is escaped."""
    parts = {
        "title": html.escape(title),
        "headline": _headline(rows),
        "rows": "\n".join(map(_score_row, rows)),
        "curve": loss_curve(losses) if losses else "",
        "settings": "\n".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in (settings or {}).items()
        ),
        "categories": "\n".join(
            f'<option value="{html.escape(name, quote=True)}">{html.escape(name)}</option>'
            for name in sorted({item.category for item in items})
        ),
        "items": "\n".join(map(_item_card, items)),
    }
    page = TEMPLATE.read_text()
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(page)
    os.replace(unfinished, path)


def _headline(rows: Sequence[ScoreRow]) -> str:
    row = rows[0]
    text = f'<b class="big">{row.score:.1%}</b> on {row.count} items'
    if row.baseline is not None:
        times = f", {row.score / row.baseline:.1f} times as much" if row.baseline > 0 else ""
        text += f"; the majority answer scores {row.baseline:.1%}{times}"
    return text


def _score_row(row: ScoreRow) -> str:
    baseline = "" if row.baseline is None else f"{row.baseline:.1%}"
    mark = "" if row.baseline is None else f'<i style="left:{100 * row.baseline:.1f}%"></i>'
    bar = f'<div class="bar"><span style="width:{100 * row.score:.1f}%"></span>{mark}</div>'
    return (
        f"<tr><td>{html.escape(row.name)}</td><td class=n>{row.count}</td><td class=n>{row.score:.1%}</td>"
        f"<td class=n>{baseline}</td><td class=wide>{bar}</td></tr>"
    )


def _item_card(item: ReportItem) -> str:
    state = "right" if item.score >= 1 else "wrong" if item.score <= 0 else "partial"
    references = " / ".join(map(html.escape, item.references))
    return (
        f'<article class="{state}" data-state="{state}" data-category="{html.escape(item.category, quote=True)}">'
        f"<figure>{_picture(item.image)}</figure><div><p class=q>{html.escape(item.question)}</p>"
        f"<dl><dt>expected</dt><dd>{references}</dd><dt>answered</dt><dd class=a>{html.escape(item.prediction)}</dd>"
        f"<dt>score</dt><dd>{item.score:.2f}</dd></dl>"
        f"<p class=meta>{html.escape(item.category)} · {html.escape(item.id)}</p></div></article>"
    )


def _picture(image: bytes | Path | None) -> str:
    """An unreadable picture is named in its place."""
    if image is None:
        return ""
    try:
        return f'<img loading="lazy" alt="" src="{_data_url(image)}">'
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return f"picture cannot be read: {html.escape(str(error))}"


def _data_url(image: bytes | Path) -> str:
    data = image.read_bytes() if isinstance(image, Path) else image
    with Image.open(io.BytesIO(data)) as opened:
        kind = (opened.format or "PNG").lower()
        if max(opened.size) > MAX_SIDE:
            small = opened.convert("RGB")
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=85)
            kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def loss_curve(losses: Sequence[tuple[int, float]], width: int = 760, height: int = 240) -> str:
    """The training loss over the steps as an SVG figure, logarithmic in the loss: each step faint, a running mean
    strong."""
    points = [(step, loss) for step, loss in losses if loss > 0]
    if not points:
        return ""
    left, right, top, bottom = 52, 12, 12, 34
    low, high = (f(loss for _, loss in points) for f in (min, max))
    low, high = math.log10(low), max(math.log10(high), math.log10(low) + 0.1)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (width - left - right)

    def y(loss: float) -> float:
        return top + (high - math.log10(loss)) / (high - low) * (height - top - bottom)

    def line(series: Sequence[tuple[int, float]], style: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in series)
        return f'<polyline points="{path}" {style}/>'

    window = max(1, len(points) // 40)
    mean, means = points[0][1], []
    for step, loss in points:
        mean += (loss - mean) / window
        means.append((step, mean))
    ticks = [m * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)]
    grid = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y(t):.1f}" y2="{y(t):.1f}" class="grid"/>'
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
        if low <= math.log10(t) <= high
    )
    labels = "".join(
        f'<text x="{x(step):.1f}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>'
        for step in sorted({round(first + (last - first) * part / 4) for part in range(5)})
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss over steps">{grid}{labels}'
        f'<text x="{(left + width - right) / 2}" y="{height - 2}" text-anchor="middle">step</text>'
        + line(points, 'class="each"')
        + line(means, 'class="mean"')
        + "</svg>"
    )
