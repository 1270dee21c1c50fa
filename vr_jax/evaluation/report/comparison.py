"""What a page shows that compares several runs: their scores side by side, their loss curves, and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vr_jax.evaluation.report.plots import Bar, LossCurve, interval_text, loss_curve, score_bar
from vr_jax.evaluation.report.scores import Estimate


@dataclass(frozen=True)
class Tile:
    """A large number at the top of the page, with the lines above and below it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        title: The name of the run.
        group: The name of the group that its row stands in; rows of a group follow each other.
        own: Whether the row is emphasised.
        scores: The score of all items under "all", and the score of each category.
        losses: The loss curves by name, as pairs of step and loss.
    """

    title: str
    group: str
    own: bool
    scores: Mapping[str, Estimate]
    losses: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class ComparedCell:
    """A score as the table shows it."""

    score: str
    interval: str


@dataclass(frozen=True)
class ComparedRow:
    """A row of the table of scores."""

    title: str
    own: bool
    bar: Bar
    cells: tuple[ComparedCell, ...]


@dataclass(frozen=True)
class Comparison:
    """The parts of the page.

    Attributes:
        lead: The first paragraph.
        tiles: The large numbers.
        columns: The names of the columns of scores.
        groups: The rows of each group, by the group's name.
        baselines: The score of the most frequent answer in each column.
        paper_title: The title of the paper's table.
        paper_head: The names of its columns.
        paper_rows: Its rows; the first cell is the name.
        curves: The loss curves, by the title of the run and the name of the curve.
        notes: Paragraphs on what the numbers say and what they do not.
        items_note: What the items of the page have in common.
        commands: What to try next, as pairs of a sentence and a command.
    """

    lead: str
    tiles: tuple[Tile, ...]
    columns: tuple[str, ...]
    groups: Mapping[str, tuple[ComparedRow, ...]]
    baselines: tuple[str, ...]
    paper_title: str
    paper_head: tuple[str, ...]
    paper_rows: tuple[tuple[str, ...], ...]
    curves: tuple[tuple[str, LossCurve], ...]
    notes: tuple[str, ...]
    items_note: str
    commands: tuple[tuple[str, str], ...]


def compared_rows(runs: Sequence[ComparedRun], columns: Sequence[str]) -> dict[str, tuple[ComparedRow, ...]]:
    """The rows of the table by group, in the order of the runs."""
    groups: dict[str, list[ComparedRow]] = {}
    for run in runs:
        cells = tuple(
            ComparedCell(f"{run.scores[name].score:.1f}", interval_text(run.scores[name]))
            if name in run.scores
            else ComparedCell("", "")
            for name in columns
        )
        groups.setdefault(run.group, []).append(ComparedRow(run.title, run.own, score_bar(run.scores["all"]), cells))
    return {name: tuple(rows) for name, rows in groups.items()}


def compared_curves(runs: Sequence[ComparedRun]) -> tuple[tuple[str, LossCurve], ...]:
    """The loss curves of all runs, each with its title."""
    found = []
    for run in runs:
        for name, losses in run.losses.items():
            if curve := loss_curve(losses):
                found.append((f"{run.title}, {run.group}: {name}", curve))
    return tuple(found)
