"""The figure of Fig. 1b: accuracy from the encoder through compressor and projector to the last decoder layer.

vr-jax probe plot RUN_A/probe RUN_B/probe --output=probe.svg"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vr_jax.plotting import figure_file
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.results import ProbeResult, TapResult

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8d5fb0", "#c98a1b", "#4c4c4c")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHORT = {"vision_remember": "VR", "deepstack": "DeepStack", "sva": "SVA"}
Position = tuple[int, int, int]  # part of the model, decoder layer, before or after the re-fusion block


def differences(results: Sequence[ProbeResult]) -> list[str]:
    """What makes results a comparison of more than the models: one line for each setting of the data and the heads."""
    lines = []
    for section in ("data", "heads"):
        first = results[0].settings[section]
        for name in first:
            values = [result.settings[section].get(name) for result in results]
            if name != "path" and any(value != values[0] for value in values):
                lines.append(f"{section}.{name}: {', '.join(map(str, values))}")
    return lines


def labels_of(results: Sequence[ProbeResult], paths: Sequence[Path], given: str | None = None) -> list[str]:
    """Those given; else the results' own, with the path where two are equal. Raises ProbeError for a wrong count."""
    if given is not None:
        labels = [label.strip() for label in given.split(",")]
        if len(labels) != len(results):
            raise ProbeError(f"--labels has {len(labels)} name(s) for {len(results)} result(s)")
        return labels
    often = Counter(result.label for result in results)
    return [
        result.label if often[result.label] == 1 else f"{result.label} ({path})"
        for result, path in zip(results, paths, strict=True)
    ]


def draw(results: Sequence[ProbeResult], path: Path, labels: Sequence[str] | None = None) -> None:
    """Writes the figure. Raises PlotError (NoMatplotlib; an unknown kind of file), and OSError."""
    with figure_file(path, (8.2, 4.4), {"font.size": 10}) as figure:
        _fill(figure.subplots(), results, labels or [result.label for result in results])


def _fill(axes: Any, results: Sequence[ProbeResult], labels: Sequence[str]) -> None:
    names = {position_of(tap): _tick(tap) for result in results for tap in result.taps}
    order = sorted(names)
    at = {position: x for x, position in enumerate(order)}
    _shade(axes, order)
    for number, (result, label) in enumerate(zip(results, labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        x = [at[position_of(tap)] for tap in result.taps]
        y = [100 * tap.mean for tap in result.taps]
        spread = [100 * (tap.spread or 0.0) for tap in result.taps]
        axes.plot(x, y, color=colour, linewidth=2, zorder=3)
        axes.errorbar(x, y, yerr=spread, color=colour, linestyle="none", capsize=3, linewidth=1.2, zorder=3)
        # Where a re-fusion block has just acted, the marker is open.
        face = ["white" if tap.kind == "refusion" else colour for tap in result.taps]
        axes.scatter(x, y, s=46, c=face, edgecolors=colour, linewidths=1.8, zorder=4, marker=MARKERS[number % 6])
        axes.plot([], [], color=colour, marker=MARKERS[number % 6], linewidth=2, markersize=6.5, label=label)
    chances = {result.chance for result in results}
    for chance in chances:
        axes.axhline(100 * chance, color="0.45", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.plot([], [], color="0.45", linestyle=(0, (4, 3)), linewidth=1, label="chance")
    axes.set_xticks(range(len(order)), [names[position] for position in order])
    axes.set_xlim(-0.5, len(order) - 0.5)
    top = max(100 * (tap.mean + (tap.spread or 0.0)) for result in results for tap in result.taps)
    axes.set_ylim(0, min(112.0, top * 1.18 + 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title("What a classifier reads from the vision tokens", loc="left", fontsize=11.5, fontweight="bold")
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=9.5)


def position_of(tap: TapResult) -> Position:
    """Where a tap stands from left to right; equal for the same place in two models."""
    part = ("encoder", "compressor", "projector", "layer", "refusion").index(tap.kind)
    return min(part, 3), tap.layer or 0, int(tap.kind == "refusion")


def _tick(tap: TapResult) -> str:
    if tap.kind in ("encoder", "compressor", "projector"):
        return tap.kind
    refusion = tap.name.partition(" + ")[2]
    return f"{tap.layer}" + (f"\n+{SHORT.get(refusion, refusion)}" if tap.kind == "refusion" else "")


def _shade(axes: Any, order: Sequence[Position]) -> None:
    """Names the two parts of the figure: before the decoder, where tokens are compressed, and in it."""
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
