"""The tables of the page: this run beside the paper's rows, and its benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vr_jax.evaluation.paper_scores import GROUP_SIZES, PAPER_SCORES, PaperRow
from vr_jax.evaluation.report.plots import axis_top, interval_text, score_bar
from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate, RunScores
from vr_jax.evaluation.report.text import escape, number
from vr_jax.experiments import DECODERS, TABLES

_DASH = "\N{EN DASH}"
# The paper's baseline and its method, at every size; other rows are folded away.
_MAIN = tuple(PaperRow("table3", row, size) for size in DECODERS for row in ("baseline", "vision_remember"))
_HEAD = (
    '<thead><tr><th>system</th><th>decoder</th><th class="n">General</th><th class="n">Knowledge</th>'
    '<th class="n">OCR&amp;Chart</th><th class="n">Average</th><th>from</th></tr></thead>'
)


def headline(run: RunScores) -> str:
    """The scores that matter most, large."""
    tiles = []
    if run.average is not None:
        tiles.append(_tile("Average of 11", run.average))
    if run.of_the_paper:
        tiles += [_tile(group, run.groups[group]) for group in GROUP_SIZES if group in run.groups]
    if not tiles:
        tiles = [_tile(one.title, one.overall) for one in run.benchmarks[:6]]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def paper_table(run: RunScores, rows: Sequence[PaperRow]) -> str:
    """This run's groups and average beside the paper's; nothing if no benchmark of the paper was run.

    rows: those that the evaluated model is; they are marked."""
    if not run.of_the_paper:
        return ""
    own = "".join(_cell(run.groups.get(group)) for group in GROUP_SIZES) + _cell(run.average)
    decoder = escape(rows[0].decoder) if rows else ""
    mine = f'<tr class="own"><th scope="row">This run</th><td>{decoder}</td>{own}<td></td></tr>'
    # One model can be a row of several tables: shown once.
    shown = {(row.decoder, PAPER_SCORES[row]) for row in _MAIN}
    first = [*(row for row in rows[:1] if (row.decoder, PAPER_SCORES[row]) not in shown), *_MAIN]
    reason = run.missing()
    note = f'<p class="note" id="missing">{_DASH} {escape(reason)}</p>' if reason else ""
    same = f'<p class="note">Marked: this model in the paper ({_names(rows)}).</p>' if rows else ""
    rest = "".join(
        f'<tbody><tr><th colspan="7" class="group">{escape(table.title)} '
        f"({escape(name.replace('table', 'Table '))})</th></tr>"
        f"{''.join(_paper_row(row, row in rows) for row in PAPER_SCORES if row.table == name)}</tbody>"
        for name, table in TABLES.items()
    )
    return (
        '<section id="paper"><h2>Beside the paper</h2><div class="scroll">'
        f"<table>{_HEAD}<tbody>{mine}{''.join(_paper_row(row, row in rows) for row in first)}</tbody></table></div>"
        f"{note}{same}"
        f'<details><summary>All rows of the paper\'s Tables 1 to 5</summary><div class="scroll">'
        f"<table>{_HEAD}{rest}</table></div></details></section>"
    )


def benchmark_table(run: RunScores) -> str:
    """The run's benchmarks by group."""
    top = axis_top([one.overall for one in run.benchmarks])
    parts = []
    for group in (*GROUP_SIZES, None):
        members = [one for one in run.benchmarks if (one.group if one.group in GROUP_SIZES else None) == group]
        if not members:
            continue
        if group is not None:
            parts.append(_group_row(group, run.groups.get(group), len(members), top))
        parts += [_benchmark_row(one, top) for one in members]
    if run.average is not None:
        parts.append(_total_row("Average", "11 of 11", run.average, top))
    return (
        '<section id="benchmarks"><h2>Benchmarks</h2><div class="scroll"><table><thead><tr><th>benchmark</th>'
        '<th class="bars"></th><th class="n">score</th><th class="n">95 % interval</th><th class="n">items</th>'
        f"<th>could not be scored</th></tr></thead><tbody>{''.join(parts)}</tbody></table></div></section>"
    )


def _tile(name: str, one: Estimate) -> str:
    lines = []
    if one.interval is not None:
        lines.append(f"95 % interval {interval_text(one)}")
    if one.items is not None:
        lines.append(f"{number(one.items)} items")
    if one.baseline is not None:
        times = f", {one.score / one.baseline:.1f} times as much" if one.baseline > 0 else ""
        lines.append(f"majority answer {one.baseline:.1f}{times}")
    below = "".join(f"<small>{escape(line)}</small>" for line in lines)
    return f'<div class="tile"><span>{escape(name)}</span><b>{one.score:.1f}</b>{below}</div>'


def _cell(one: Estimate | None) -> str:
    if one is None:
        return f'<td class="n" aria-describedby="missing">{_DASH}</td>'
    return f'<td class="n">{one.score:.1f}<small>{interval_text(one)}</small></td>'


def _paper_row(row: PaperRow, same: bool) -> str:
    printed = PAPER_SCORES[row]
    scores = "".join(f'<td class="n">{score:.1f}</td>' for score in (*printed.groups.values(), printed.average))
    return (
        f'<tr class="{"same" if same else ""}"><th scope="row">{escape(row.title)}</th><td>{escape(row.decoder)}</td>'
        f'{scores}<td class="soft">{escape(row.source)}</td></tr>'
    )


def _names(rows: Iterable[PaperRow]) -> str:
    return escape("; ".join(f"{row.source}: {row.title}, {row.decoder}" for row in rows))


def _group_row(group: str, one: Estimate | None, members: int, top: float) -> str:
    share = f"{members} of {GROUP_SIZES[group]}"  # type: ignore[index]
    if one is not None:
        return _total_row(group, share, one, top)
    return (
        f'<tr class="whole"><th scope="row">{escape(group)} <small>{share}</small></th><td></td>'
        f'<td class="n">{_DASH}</td><td></td><td></td><td></td></tr>'
    )


def _total_row(name: str, share: str, one: Estimate, top: float) -> str:
    return (
        f'<tr class="whole"><th scope="row">{escape(name)} <small>{share}</small></th>'
        f'<td class="bars">{score_bar(one, top)}</td><td class="n">{one.score:.1f}</td>'
        f'<td class="n soft">{interval_text(one)}</td><td></td><td></td></tr>'
    )


def _benchmark_row(one: BenchmarkScores, top: float) -> str:
    reasons = ", ".join(f"{number(count)} {reason.replace('_', ' ')}" for reason, count in one.unscored.items())
    items = "" if one.overall.items is None else number(one.overall.items)
    return (
        f'<tr><th scope="row" class="member">{escape(one.title)}</th>'
        f'<td class="bars">{score_bar(one.overall, top)}</td>'
        f'<td class="n">{one.overall.score:.1f}</td><td class="n soft">{interval_text(one.overall)}</td>'
        f'<td class="n soft">{items}</td><td class="soft">{escape(reasons)}</td></tr>'
    )
