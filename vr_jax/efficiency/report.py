"""What was measured, for people: a table for the terminal, the same in Markdown; and the files of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vr_jax.efficiency.plot import draw
from vr_jax.efficiency.results import Measurement, Report, Spread
from vr_jax.storage import write_text

JSON, MARKDOWN, PLOT = "efficiency.json", "efficiency.md", "efficiency.svg"
MIB = 2**20

Scores = Sequence[float | None]


def rows(report: Report, scores: Scores) -> list[list[str]]:
    """The table's head and its rows."""
    first = report.measurements[0]
    measured = any(one.measured_peak_bytes is not None for one in report.measurements)
    scored = any(score is not None for score in scores)
    head = ["system", "parameters", "vision tokens", "TTFT, ms", "ratio", "tokens/s", "ratio", "compiled peak, MiB"]
    head += ["difference, MiB"] if len(report.measurements) > 1 else []
    head += (["measured peak, MiB"] if measured else []) + (["score"] if scored else [])
    table = [head]
    for one, score in zip(report.measurements, scores, strict=True):
        cells = [
            one.name,
            f"{one.parameters / 1e6:.1f} M",
            _vision(one),
            _spread(one.first_token_ms),
            f"{one.first_token_ms.median / first.first_token_ms.median:.2f}",
            _spread(one.tokens_per_second),
            f"{one.tokens_per_second.median / first.tokens_per_second.median:.2f}",
            _mib(one.memory.peak),
        ]
        if len(report.measurements) > 1:
            known = one.memory.peak is not None and first.memory.peak is not None
            cells.append(f"{(one.memory.peak - first.memory.peak) / MIB:+,.1f}" if known else "not available")  # type: ignore[operator]
        cells += [_mib(one.measured_peak_bytes)] if measured else []
        cells += ["" if score is None else f"{score:.1f}"] if scored else []
        table.append(cells)
    return table


def notes(report: Report) -> list[str]:
    """What the numbers are numbers of."""
    settings, machine = report.settings, report.machine
    tiles = sorted({one.tiles for one in report.measurements})
    device = machine.processor if machine.platform == "cpu" else machine.device
    order = "one system after another" if settings.isolated else "in turns"
    lines = [
        f"{device}, {machine.platform}, {machine.cores} cores, jax {machine.jax}; {settings.dtype}, batch "
        f"{settings.batch_size}; prompts of {settings.text_tokens} text tokens and one image, {settings.image}, "
        f"{' or '.join(map(str, tiles))} tiles, padded to {'buckets' if settings.buckets else 'nothing'}; "
        f"{settings.new_tokens} new tokens.",
        f"Median (lowest .. highest) of {settings.repeats} repeats, {order}, after {settings.warmup} for warming up; "
        "ratio and difference to the first system.",
        "TTFT: from tokens and uint8 tiles in host memory to the first token in host memory. tokens/s: the decode loop "
        "behind that token.",
        "compiled peak: parameters, inputs, results and temporaries by XLA's buffer assignment, the larger of prefill "
        "and decode.",
    ]
    if all(one.measured_peak_bytes is None for one in report.measurements):
        why = "this device keeps no such statistic"
        if machine.platform != "cpu":
            why = "only with --isolate, or one system alone, on a device that keeps the statistic"
        lines.append(f"measured peak (the device's own peak_bytes_in_use): not available: {why}.")
    else:
        lines.append("measured peak: the device's own peak_bytes_in_use, of a process that ran this system only.")
    return lines


def text(report: Report, scores: Scores) -> str:
    """For the terminal."""
    table = rows(report, scores)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in line).rstrip()
        for line in (enumerate(zip(row, widths, strict=True)) for row in table)
    ]
    return "\n".join([*lines, "", *notes(report)])


def markdown(report: Report, scores: Scores) -> str:
    table = rows(report, scores)
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    lines = [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (table[0], rule, *table[1:])
    ]
    sources = [f"* `{one.name}`: `{one.source}`" for one in report.measurements]
    explained = [f"* {note}" for note in notes(report)]
    return "\n".join(["# Efficiency", "", *lines, "", *explained, "", *sources, "", f"![plot]({PLOT})", ""])


def write(directory: Path, report: Report, scores: Scores) -> None:
    """The three files of a run, each complete or not there. Raises PlotError, and OSError."""
    write_text(directory / JSON, json.dumps(report.to_dict(scores), indent=2) + "\n")
    write_text(directory / MARKDOWN, markdown(report, scores))
    draw(report, scores, directory / PLOT)


def _vision(one: Measurement) -> str:
    last = one.vision_tokens_by_stage[-1]
    return f"{one.vision_tokens:,}" + (f" -> {last:,}" if last != one.vision_tokens else "")


def _spread(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f} .. {spread.high:,.1f})"


def _mib(size: int | None) -> str:
    return "not available" if size is None else f"{size / MIB:,.1f}"
