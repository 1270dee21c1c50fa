"""The plot of a measurement: accuracy over time to first token (the paper's Figure 4), or bars without accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vr_jax.efficiency.results import Measurement, Report
from vr_jax.plotting import figure_file
from vr_jax.storage import Path

# The diameter of the largest circle in points.
LARGEST = 44.0
COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860", "#DA8BC3", "#8C8C8C", "#CCB974", "#64B5CD")
GIB = 2**30
RC = {"font.size": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(report: Report, scores: Sequence[float | None], path: Path) -> None:
    """Writes the plot. The same numbers give the same file.

    Args:
        report: The measurements.
        scores: The accuracy of each system, or None where it is not known. Without any, the plot has bars.
        path: The file, whose suffix is one of `vr_jax.plotting.SUFFIXES`.

    Raises:
        UserError: The file cannot be written, or matplotlib is not installed.
    """
    known = [(one, score) for one, score in zip(report.measurements, scores, strict=True) if score is not None]
    size = (7.6, 4.0 if known else 1.6 + 0.45 * len(report.measurements))
    with figure_file(path, size, RC) as figure:
        axes = figure.subplots()
        if known:
            _circles(figure, axes, known)
        else:
            _bars(axes, report.measurements)
        machine = report.machine
        device = machine.processor if machine.platform == "cpu" else machine.device
        figure.suptitle(f"{device}, {report.settings.dtype}, batch {report.settings.batch_size}", x=0.01, ha="left")


def _circles(figure: Any, axes: Any, known: Sequence[tuple[Measurement, float]]) -> None:
    """Draws a circle for each system, whose area is proportional to the memory.

    A line spans the fastest to the slowest run. The names stand beside the plot, the best system first, because the
    circles of similar systems overlap.
    """
    largest = max((one.memory.peak or 0 for one, _ in known), default=0)
    handles = []
    for index, (one, score) in enumerate(sorted(known, key=lambda pair: -pair[1])):
        colour, times = COLOURS[index % len(COLOURS)], one.first_token_ms
        share = one.memory.peak / largest if one.memory.peak and largest else 0.05
        axes.hlines(score, times.low, times.high, color=colour, linewidth=1)
        area = share * LARGEST**2
        handles.append(axes.scatter(times.median, score, s=area, color=colour, alpha=0.45, linewidths=0))
        axes.annotate(str(index + 1), (times.median, score), ha="center", va="center", fontsize=8, weight="bold")
        handles[-1].set_label(
            f"{index + 1}  {one.name}, {score:.1f}\n    {times.median:,.1f} ms, {_gib(one.memory.peak)}"
        )
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, labelspacing=0.7)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    axes.margins(x=0.15, y=0.2)
    axes.set(xlabel="time to first token (ms)", ylabel="score")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_title("circle area: peak device memory (compiled programs)", fontsize=8, color="0.35", loc="left")


def _bars(axes: Any, measurements: Sequence[Measurement]) -> None:
    """Draws a bar for each system, the first on top; a line spans the fastest to the slowest run."""
    base = measurements[0].first_token_ms.median
    for index, one in enumerate(measurements):
        times = one.first_token_ms
        axes.barh(index, times.median, height=0.62, color=COLOURS[index % len(COLOURS)], alpha=0.75)
        axes.hlines(index, times.low, times.high, color="0.2", linewidth=1)
        label = f"{times.median:,.1f} ms, x {times.median / base:.2f}; {_gib(one.memory.peak)}"
        axes.annotate(label, (times.high, index), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    longest = max(one.first_token_ms.high for one in measurements)
    axes.set_xlim(0, 1.55 * longest)  # The labels need room at the right.
    axes.set_yticks(range(len(measurements)), [one.name for one in measurements])
    axes.invert_yaxis()
    axes.set(xlabel="time to first token (ms)")
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        "labels: ratio to the first; peak device memory (compiled programs)", fontsize=8, color="0.35", loc="left"
    )


def _gib(size: int | None) -> str:
    if size is None:
        return "memory not available"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 4 else f"{size / 2**20:.1f} MiB"
