"""The figure of a probe (the paper's Figure 1b): accuracy from the encoder to the last decoder layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vr_jax.errors import UserError
from vr_jax.plotting import figure_file
from vr_jax.probe.results import ProbeResult, TapResult
from vr_jax.storage import Path

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8d5fb0", "#c98a1b", "#4c4c4c")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHORT = {"vision_remember": "VR", "deepstack": "DeepStack", "sva": "SVA"}
# The part of the model, the decoder layer, and 1 behind a re-fusion block; the order of positions is that of the taps.
Position = tuple[int, int, int]


def differences(results: Sequence[ProbeResult]) -> list[str]:
    """Compares the settings of the data and of the heads, which should be equal in one figure.

    Returns:
        One line for each setting in which the results differ.
    """
    lines = []
    for section in ("data", "heads"):
        first = results[0].settings[section]
        for name in first:
            values = [result.settings[section].get(name) for result in results]
            if name != "path" and any(value != values[0] for value in values):
                lines.append(f"{section}.{name}: {', '.join(map(str, values))}")
    return lines


def labels_of(results: Sequence[ProbeResult], paths: Sequence[Path], given: str | None = None) -> list[str]:
    """Returns the name of each result in a figure.

    Args:
        results: The results.
        paths: Their paths, which are added to the names of results with equal names.
        given: The names to use instead of the results' own, separated by commas.

    Raises:
        UserError: `given` has not one name for each result.
    """
    if given is not None:
        labels = [label.strip() for label in given.split(",")]
        if len(labels) != len(results):
            raise UserError(f"--labels has {len(labels)} name(s), but there are {len(results)} result(s).")
        return labels
    often = Counter(result.label for result in results)
    return [
        result.label if often[result.label] == 1 else f"{result.label} ({path})"
        for result, path in zip(results, paths, strict=True)
    ]


def draw(results: Sequence[ProbeResult], path: Path, labels: Sequence[str] | None = None) -> None:
    """Writes the figure of one or several results.

    Args:
        results: The results, one line each.
        path: The file, whose suffix is one of `vr_jax.plotting.SUFFIXES`.
        labels: The names of the lines; by default those of the results.

    Raises:
        UserError: The file cannot be written, or matplotlib is not installed.
    """
    with figure_file(path, (8.2, 4.4), {"font.size": 10}) as figure:
        draw_axes(figure.subplots(), results, labels or [result.label for result in results])


def draw_axes(axes: Any, results: Sequence[ProbeResult], labels: Sequence[str]) -> None:
    """Draws the results into the axes of a figure."""
    names = {position_of(tap): tick_label(tap) for result in results for tap in result.taps}
    order = sorted(names)
    at = {position: x for x, position in enumerate(order)}
    _shade(axes, order)
    for number, (result, label) in enumerate(zip(results, labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        x = [at[position_of(tap)] for tap in result.taps]
        y = [100 * tap.mean for tap in result.taps]
        deviation = [100 * (tap.deviation or 0.0) for tap in result.taps]
        axes.plot(x, y, color=colour, linewidth=2, zorder=3)
        axes.errorbar(x, y, yerr=deviation, color=colour, linestyle="none", capsize=3, linewidth=1.2, zorder=3)
        # An open marker shows that a re-fusion block has just acted.
        face = ["white" if tap.kind == "refusion" else colour for tap in result.taps]
        axes.scatter(x, y, s=46, c=face, edgecolors=colour, linewidths=1.8, zorder=4, marker=MARKERS[number % 6])
        axes.plot([], [], color=colour, marker=MARKERS[number % 6], linewidth=2, markersize=6.5, label=label)
    chances = {result.chance for result in results}
    for chance in chances:
        axes.axhline(100 * chance, color="0.45", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.plot([], [], color="0.45", linestyle=(0, (4, 3)), linewidth=1, label="chance")
    axes.set_xticks(range(len(order)), [names[position] for position in order])
    axes.set_xlim(-0.5, len(order) - 0.5)
    top = max(100 * (tap.mean + (tap.deviation or 0.0)) for result in results for tap in result.taps)
    axes.set_ylim(0, min(112.0, top * 1.18 + 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title("Accuracy of a classifier on the vision tokens", loc="left", fontsize=11.5, fontweight="bold")
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=9.5)


def position_of(tap: TapResult) -> Position:
    """Returns the position of a tap in the figure. It is equal for the same place in two models."""
    part = ("encoder", "compressor", "projector", "layer", "refusion").index(tap.kind)
    return min(part, 3), tap.layer or 0, int(tap.kind == "refusion")


def tick_label(tap: TapResult) -> str:
    """Returns the label of a tap on the horizontal axis."""
    if tap.kind in ("encoder", "compressor", "projector"):
        return tap.kind
    refusion = tap.name.partition(" + ")[2]
    return f"{tap.layer}" + (f"\n+{SHORT.get(refusion, refusion)}" if tap.kind == "refusion" else "")


def _shade(axes: Any, order: Sequence[Position]) -> None:
    """Shades and names the two parts of the figure: the taps before the decoder, and those in it."""
    first = next((x for x, position in enumerate(order) if position[0] == 3), len(order))
    spans = [
        (-0.5, first - 0.5, "vision encoder and projector", "#f4f1e8"),
        (first - 0.5, len(order) - 0.5, "LLM, after decoder layer", "#eef3f8"),
    ]
    for start, stop, title, colour in spans:
        if stop > start:
            axes.axvspan(start, stop, color=colour, zorder=0, linewidth=0)
            middle = (start + stop) / 2
            axes.text(
                middle,
                0.985,
                title,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color="0.35",
                fontsize=9,
            )
