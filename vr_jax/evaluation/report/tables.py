"""The tables of the page: the headline scores, this run beside the paper's rows, and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vr_jax.evaluation.interface import Group
from vr_jax.evaluation.paper_scores import GROUP_SIZES, PAPER_SCORES, PaperRow
from vr_jax.evaluation.report.plots import Bar, axis_top, interval_text, items_text, score_bar
from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate, RunScores
from vr_jax.evaluation.report.text import DASH, thousands
from vr_jax.experiments import DECODERS, TABLES

_HEADLINES = 6  # The number of benchmarks in the headline if none of them is of the paper.
# These rows are always shown: the paper's baseline and its method at every size. The others are folded away.
_MAIN = tuple(PaperRow("table3", row, size) for size in DECODERS for row in ("baseline", "vision_remember"))


@dataclass(frozen=True)
class Tile:
    """A headline score with its name and further lines."""

    name: str
    score: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class PaperRowView:
    """A row of the paper.

    Attributes:
        title: The name of the system.
        decoder: The name of the decoder.
        scores: The scores of the three groups and the average.
        source: The name of the table.
        marked: Whether the evaluated model is the model of the row.
    """

    title: str
    decoder: str
    scores: tuple[str, ...]
    source: str
    marked: bool


@dataclass(frozen=True)
class PaperTable:
    """This run beside the paper.

    Attributes:
        decoder: The name of the decoder of this run, if the paper has it.
        own: The scores and intervals of this run for the three groups and the average.
        first: The rows that are always shown.
        missing: The reason why scores of this run are missing, or an empty text.
        marked: The names of the paper's rows that are this model, or an empty text.
        tables: The titles and rows of all tables of the paper.
    """

    decoder: str
    own: tuple[tuple[str, str], ...]
    first: tuple[PaperRowView, ...]
    missing: str
    marked: str
    tables: tuple[tuple[str, tuple[PaperRowView, ...]], ...]


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of the table of benchmarks.

    Attributes:
        name: The title of the benchmark, or the name of a group or of the average.
        member: Whether the row is a benchmark of the group above it.
        share: For a group or the average, the number of its benchmarks that were run; otherwise empty.
        bar: The bar, or None if there is no score.
        score: The score.
        interval: The interval of the score.
        items: The number of items.
        unscored: The reasons why items could not be scored, with their numbers.
    """

    name: str
    member: bool
    share: str
    bar: Bar | None
    score: str
    interval: str
    items: str
    unscored: str


def headline(run: RunScores) -> list[Tile]:
    """Returns the most important scores: the average and the groups, or else the first benchmarks."""
    tiles = []
    if run.average is not None:
        tiles.append(_tile("Average of 11", run.average))
    if run.of_the_paper:
        tiles += [_tile(group, run.groups[group]) for group in GROUP_SIZES if group in run.groups]
    return tiles or [_tile(one.title, one.overall) for one in run.benchmarks[:_HEADLINES]]


def paper_table(run: RunScores, rows: Sequence[PaperRow]) -> PaperTable | None:
    """Compares a run with the paper.

    Args:
        run: The scores of the run.
        rows: The rows of the paper whose model was evaluated. They are marked.

    Returns:
        The table, or None if no benchmark of the paper was run.
    """
    if not run.of_the_paper:
        return None
    # One model can be in several tables of the paper. It is shown once.
    shown = {(row.decoder, PAPER_SCORES[row]) for row in _MAIN}
    first = [*(row for row in rows[:1] if (row.decoder, PAPER_SCORES[row]) not in shown), *_MAIN]
    reason = run.missing()
    return PaperTable(
        decoder=rows[0].decoder if rows else "",
        own=tuple(_own(one) for one in (*(run.groups.get(group) for group in GROUP_SIZES), run.average)),
        first=tuple(_paper_row(row, row in rows) for row in first),
        missing=f"{DASH} {reason}" if reason else "",
        marked=_names(rows),
        tables=tuple(
            (
                f"{table.title} ({name.replace('table', 'Table ')})",
                tuple(_paper_row(row, row in rows) for row in PAPER_SCORES if row.table == name),
            )
            for name, table in TABLES.items()
        ),
    )


def benchmark_table(run: RunScores) -> list[BenchmarkRow]:
    """Returns the benchmarks of a run by group, with the scores of the groups and the average."""
    top = axis_top([one.overall for one in run.benchmarks])
    rows = []
    for group, size in GROUP_SIZES.items():
        members = [one for one in run.benchmarks if one.group == group]
        if members:
            rows.append(_total_row(group, f"{len(members)} of {size}", run.groups.get(group), top))
            rows += [_benchmark_row(one, top) for one in members]
    rows += [_benchmark_row(one, top) for one in run.benchmarks if one.group not in GROUP_SIZES]
    if run.average is not None:
        rows.append(_total_row("Average", "11 of 11", run.average, top))
    return rows


def _tile(name: Group | str, one: Estimate) -> Tile:
    lines = []
    if one.interval is not None:
        lines.append(f"95 % interval {interval_text(one)}")
    if one.items is not None:
        lines.append(f"{thousands(one.items)} items")
    if one.baseline is not None:
        lines.append(f"most frequent answer {one.baseline:.1f}")
        if one.baseline > 0:
            lines.append(f"{one.score / one.baseline:.1f} times as high")
    return Tile(name, f"{one.score:.1f}", tuple(lines))


def _own(one: Estimate | None) -> tuple[str, str]:
    return (DASH, "") if one is None else (f"{one.score:.1f}", interval_text(one))


def _paper_row(row: PaperRow, marked: bool) -> PaperRowView:
    printed = PAPER_SCORES[row]
    scores = tuple(f"{score:.1f}" for score in (*printed.groups.values(), printed.average))
    return PaperRowView(row.title, row.decoder, scores, row.source, marked)


def _names(rows: Iterable[PaperRow]) -> str:
    return "; ".join(f"{row.source}: {row.title}, {row.decoder}" for row in rows)


def _total_row(name: str, share: str, one: Estimate | None, top: float) -> BenchmarkRow:
    if one is None:
        return BenchmarkRow(name, False, share, None, DASH, "", "", "")
    return BenchmarkRow(name, False, share, score_bar(one, top), f"{one.score:.1f}", interval_text(one), "", "")


def _benchmark_row(one: BenchmarkScores, top: float) -> BenchmarkRow:
    reasons = ", ".join(f"{thousands(count)} {reason.replace('_', ' ')}" for reason, count in one.unscored.items())
    return BenchmarkRow(
        name=one.title,
        member=one.group in GROUP_SIZES,
        share="",
        bar=score_bar(one.overall, top),
        score=f"{one.overall.score:.1f}",
        interval=interval_text(one.overall),
        items=items_text(one.overall),
        unscored=reasons,
    )
