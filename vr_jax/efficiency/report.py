"""The presentation of a measurement: a table for the terminal, the same in Markdown, and the files of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vr_jax.efficiency.plot import draw
from vr_jax.efficiency.results import Measurement, Repeats, Report
from vr_jax.storage import Path, write_text

JSON, MARKDOWN, PLOT = "efficiency.json", "efficiency.md", "efficiency.svg"
MIB = 2**20

Scores = Sequence[float | None]


def rows(report: Report, scores: Scores) -> list[list[str]]:
    """Returns the cells of the table, with the head as the first row.

    Args:
        report: The measurements.
        scores: The accuracy of each system, or None where it is not known.
    """
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
            _range(one.first_token_ms),
            f"{one.first_token_ms.median / first.first_token_ms.median:.2f}",
            _range(one.tokens_per_second),
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
    """Returns sentences that state how the numbers of the table were measured."""
    settings, machine = report.settings, report.machine
    tiles = sorted({one.tiles for one in report.measurements})
    device = machine.processor if machine.platform == "cpu" else machine.device
    order = "one system after another" if settings.isolated else "in turns"
    image = settings.image
    if settings.image_size is not None:
        image += f" of {settings.image_size[0]} x {settings.image_size[1]} pixels"
    padding = "padded to buckets" if settings.buckets else "not padded"
    lines = [
        f"Machine: {device}, {machine.platform}, {machine.cores} cores, jax {machine.jax}. Models: {settings.dtype}, "
        f"batch {settings.batch_size}. Prompts: {settings.text_tokens} text tokens and one image, {image}, "
        f"{' or '.join(map(str, tiles))} tiles, {padding}; {settings.new_tokens} new tokens.",
        f"Values are the median (lowest .. highest) of {settings.repeats} repeats, {order}, after {settings.warmup} "
        "runs for warming up. Ratios and differences compare with the first system.",
        "TTFT is the time from tokens and uint8 tiles in host memory to the first token in host memory. tokens/s is "
        "the speed of decoding the other tokens.",
        "The compiled peak is the larger of prefill and decode: parameters, inputs, results and temporaries according "
        "to XLA's buffer assignment.",
    ]
    if any(one.measured_peak_bytes is not None for one in report.measurements):
        lines.append("The measured peak is the device's own peak_bytes_in_use in a process that ran only this system.")
    elif machine.platform == "cpu":
        lines.append("The measured peak (peak_bytes_in_use) is not available: this device does not record it.")
    else:
        lines.append(
            "The measured peak (peak_bytes_in_use) is not available: it needs --isolate or a single system, and a "
            "device that records it."
        )
    return lines


def text(report: Report, scores: Scores) -> str:
    """Formats the table and its notes for the terminal."""
    table = rows(report, scores)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in line).rstrip()
        for line in (enumerate(zip(row, widths, strict=True)) for row in table)
    ]
    return "\n".join([*lines, "", *notes(report)])


def markdown(report: Report, scores: Scores) -> str:
    """Formats the table, its notes and the origins of the models as Markdown."""
    table = rows(report, scores)
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    lines = [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (table[0], rule, *table[1:])
    ]
    sources = [f"* `{one.name}`: `{one.source}`" for one in report.measurements]
    explained = [f"* {note}" for note in notes(report)]
    return "\n".join(["# Efficiency", "", *lines, "", *explained, "", *sources, "", f"![plot]({PLOT})", ""])


def write(directory: Path, report: Report, scores: Scores) -> None:
    """Writes the three files of a run, each whole or not at all.

    Args:
        directory: The folder of the files.
        report: The measurements.
        scores: The accuracy of each system, or None where it is not known.

    Raises:
        UserError: A file cannot be written, or matplotlib is not installed.
    """
    write_text(directory / JSON, json.dumps(report.to_dict(scores), indent=2) + "\n")
    write_text(directory / MARKDOWN, markdown(report, scores))
    draw(report, scores, directory / PLOT)


def _vision(one: Measurement) -> str:
    """Formats the number of vision tokens, with that of the last stage if a pruner drops some."""
    last = one.vision_tokens_by_stage[-1]
    return f"{one.vision_tokens:,}" + (f" -> {last:,}" if last != one.vision_tokens else "")


def _range(values: Repeats) -> str:
    """Formats the median, the lowest and the highest value."""
    return f"{values.median:,.1f} ({values.low:,.1f} .. {values.high:,.1f})"


def _mib(size: int | None) -> str:
    return "not available" if size is None else f"{size / MIB:,.1f}"
