"""The plots of the page, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate
from vr_jax.evaluation.report.text import breakable, escape, number

_CAP = 2.2  # half the height of a whisker's ends, of 12


def score_plot(benchmark: BenchmarkScores) -> str:
    """Horizontal bars with interval whiskers, all items first and then each category, as a table whose texts say the
    same as the bars."""
    parts = {name: one for name, one in benchmark.categories.items() if len(benchmark.categories) > 1}
    estimates = [benchmark.overall, *parts.values()]
    top = axis_top(estimates)
    baseline = any(one.baseline is not None for one in estimates)
    rows = _row("all", benchmark.overall, top, baseline, "whole") + "".join(
        _row(name, one, top, baseline, "") for name, one in parts.items()
    )
    ticks = "".join(f"<span>{top * part / 4:g}</span>" for part in range(5))
    majority = '<th class="n">majority</th>' if baseline else ""
    return (
        f'<figure class="plot"><table><caption>{escape(benchmark.title)}</caption><thead><tr>'
        f'<th>category</th><th class="bars"><span class="axis" aria-hidden="true">{ticks}</span></th>'
        f'<th class="n">score</th><th class="n">95 % interval</th>{majority}<th class="n">items</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></figure>"
    )


def axis_top(estimates: Sequence[Estimate]) -> float:
    """100, or the next hundred where a benchmark's own unit goes beyond."""
    highest = max((max(one.score, one.interval[1] if one.interval else 0.0) for one in estimates), default=0.0)
    return max(100.0, 100 * math.ceil(highest / 100 - 1e-9))


def score_bar(one: Estimate, top: float = 100.0) -> str:
    """One bar. It stretches to the width it is given; lines keep their thickness."""

    def x(score: float) -> str:
        return f"{100 * min(max(score, 0.0), top) / top:.2f}"

    def line(place: str, low: float, high: float, style: str) -> str:
        return f'<path d="M{place} {low:g}V{high:g}" class="{style}"/>'

    drawn = "".join(line(f"{place}", 0, 12, "grid") for place in (0, 25, 50, 75, 100))
    drawn += f'<rect x="0" y="1.5" width="{x(one.score)}" height="9" class="fill"/>'
    if one.interval is not None:
        low, high = map(x, one.interval)
        drawn += f'<path d="M{low} 6H{high}" class="whisker"/>'
        drawn += "".join(line(place, 6 - _CAP, 6 + _CAP, "whisker") for place in (low, high))
    if one.baseline is not None:
        drawn += line(x(one.baseline), 0, 12, "baseline")
    return (
        f'<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{_in_words(one)}">{drawn}</svg>'
    )


def interval_text(one: Estimate) -> str:
    return "" if one.interval is None else f"{one.interval[0]:.1f}\N{EN DASH}{one.interval[1]:.1f}"


def _in_words(one: Estimate) -> str:
    text = f"score {one.score:.1f}"
    if one.interval is not None:
        text += f", 95 % interval {one.interval[0]:.1f} to {one.interval[1]:.1f}"
    return text if one.baseline is None else f"{text}, majority answer {one.baseline:.1f}"


def _row(name: str, one: Estimate, top: float, baseline: bool, style: str) -> str:
    majority = ""
    if baseline:
        majority = f'<td class="n">{"" if one.baseline is None else f"{one.baseline:.1f}"}</td>'
    return (
        f'<tr class="{style}"><th scope="row"><bdi>{breakable(name)}</bdi></th>'
        f'<td class="bars">{score_bar(one, top)}</td>'
        f'<td class="n">{one.score:.1f}</td><td class="n soft">{interval_text(one)}</td>{majority}'
        f'<td class="n soft">{"" if one.items is None else number(one.items)}</td></tr>'
    )


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
