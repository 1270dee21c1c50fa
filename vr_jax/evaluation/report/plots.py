"""The plots of the page: bars with intervals, and the curve of the training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate
from vr_jax.evaluation.report.text import DASH, short_name, thousands


@dataclass(frozen=True)
class Bar:
    """A bar whose axis is 100 units long.

    Attributes:
        words: The score in words.
        width: The length of the bar.
        whisker: The ends of the interval, or None.
        baseline: The place of the mark for the most frequent answer, or None.
    """

    words: str
    width: str
    whisker: tuple[str, str] | None
    baseline: str | None


@dataclass(frozen=True)
class PlotRow:
    """A row of a plot: the bar and the same numbers as texts."""

    name: str
    bar: Bar
    score: str
    interval: str
    baseline: str
    items: str


@dataclass(frozen=True)
class ScorePlot:
    """The scores of a benchmark and of its categories as bars.

    Attributes:
        title: The title of the benchmark.
        ticks: The labels of the axis.
        with_baseline: Whether a column shows the score of the most frequent answer.
        rows: The rows; the first one is for all items.
    """

    title: str
    ticks: tuple[str, ...]
    with_baseline: bool
    rows: tuple[PlotRow, ...]


@dataclass(frozen=True)
class LossCurve:
    """The training loss over the steps, with a logarithmic axis of the loss, in SVG units.

    Attributes:
        each: The points of the loss at each step.
        mean: The points of the running mean.
        losses: The vertical place and the label of each grid line.
        steps: The horizontal place and the label of each tick.
        width: The width of the figure.
        height: The height of the figure.
        left: The left end of the axis of the steps.
        right: The right end of the axis of the steps.
        bottom: The lower end of the axis of the loss.
    """

    each: str
    mean: str
    losses: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, str], ...]
    width: int
    height: int
    left: int
    right: int
    bottom: int


def score_plot(benchmark: BenchmarkScores) -> ScorePlot:
    """Plots the score of a benchmark and, if it has several categories, the score of each."""
    parts = {name: one for name, one in benchmark.categories.items() if len(benchmark.categories) > 1}
    estimates = {"all": benchmark.overall} | parts
    top = axis_top(list(estimates.values()))
    return ScorePlot(
        title=benchmark.title,
        ticks=tuple(f"{top * part / 4:g}" for part in range(5)),
        with_baseline=any(one.baseline is not None for one in estimates.values()),
        rows=(_row("all", benchmark.overall, top), *(_row(name, one, top) for name, one in parts.items())),
    )


def axis_top(estimates: Sequence[Estimate]) -> float:
    """Returns the end of the axis: 100, or the next hundred if a score of a benchmark's own is larger."""
    highest = max((max(one.score, one.interval[1] if one.interval else 0.0) for one in estimates), default=0.0)
    return max(100.0, 100 * math.ceil(highest / 100 - 1e-9))


def score_bar(one: Estimate, top: float = 100.0) -> Bar:
    """Draws one bar on an axis from 0 to `top`."""

    def x(score: float) -> str:
        return f"{100 * min(max(score, 0.0), top) / top:.2f}"

    return Bar(
        words=_in_words(one),
        width=x(one.score),
        whisker=None if one.interval is None else (x(one.interval[0]), x(one.interval[1])),
        baseline=None if one.baseline is None else x(one.baseline),
    )


def interval_text(one: Estimate) -> str:
    """Writes an interval, or nothing if there is none."""
    return "" if one.interval is None else f"{one.interval[0]:.1f}{DASH}{one.interval[1]:.1f}"


def items_text(one: Estimate) -> str:
    """Writes the number of items, or nothing if it is unknown."""
    return "" if one.items is None else thousands(one.items)


def _in_words(one: Estimate) -> str:
    text = f"score {one.score:.1f}"
    if one.interval is not None:
        text += f", 95 % interval {one.interval[0]:.1f} to {one.interval[1]:.1f}"
    return text if one.baseline is None else f"{text}, most frequent answer {one.baseline:.1f}"


def _row(name: str, one: Estimate, top: float) -> PlotRow:
    return PlotRow(
        name=short_name(name),
        bar=score_bar(one, top),
        score=f"{one.score:.1f}",
        interval=interval_text(one),
        baseline="" if one.baseline is None else f"{one.baseline:.1f}",
        items=items_text(one),
    )


def loss_curve(losses: Sequence[tuple[int, float]], width: int = 760, height: int = 240) -> LossCurve | None:
    """Plots the training loss.

    Args:
        losses: The steps and their losses. Losses that are not positive are left out.
        width: The width of the figure in SVG units.
        height: The height of the figure in SVG units.

    Returns:
        The curve, or None if there is no loss to plot.
    """
    points = [(step, loss) for step, loss in losses if loss > 0]
    if not points:
        return None
    left, right, top, bottom = 52, width - 12, 12, height - 34
    low, high = (math.log10(extreme(loss for _, loss in points)) for extreme in (min, max))
    high = max(high, low + 0.1)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def x(step: float) -> float:
        return round(left + (step - first) / (last - first) * (right - left), 1)

    def y(loss: float) -> float:
        return round(top + (high - math.log10(loss)) / (high - low) * (bottom - top), 1)

    def line(series: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in series)

    window = max(1, len(points) // 40)
    mean, means = points[0][1], []
    for step, loss in points:
        mean += (loss - mean) / window
        means.append((step, mean))
    ticks = [m * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)]
    steps = sorted({round(first + (last - first) * part / 4) for part in range(5)})
    return LossCurve(
        each=line(points),
        mean=line(means),
        losses=tuple((y(tick), f"{tick:g}") for tick in ticks if low <= math.log10(tick) <= high),
        steps=tuple((x(step), str(step)) for step in steps),
        width=width,
        height=height,
        left=left,
        right=right,
        bottom=bottom,
    )
