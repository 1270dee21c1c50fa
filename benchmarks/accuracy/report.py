"""Makes the paper's tables and the plot from finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.accuracy.results import Run
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.systems import Systems, systems
from vr_jax.data.demo.pages import KINDS
from vr_jax.experiments import TABLES

# The rows with pooling, by compression. The row with Vision Remember has the same name with "_vr" at its end.
RATIOS = {4: ("table2", "ratio4"), 9: ("table2", "ratio9"), 16: ("table2", "ratio16")}
UNCOMPRESSED = ("table4", "uncompressed")


def tables(setting: Setting, runs: Iterable[Run]) -> str:
    """The tables as Markdown.

    Each number is the percentage of right answers on held-out images: the mean over the seeds, and the sample standard
    deviation.
    """
    known, by_system = systems(setting), _by_system(runs)
    return "\n\n".join(_table(name, known, by_system) for name in TABLES) + "\n"


def _table(name: str, known: Systems, by_system: dict[str, list[Run]]) -> str:
    head = ["system", "overall", "gain", *KINDS, "seeds", "added parameters"]
    lines = [f"### {name}: {TABLES[name].title}", "", _line(head), _line(["---"] * len(head))]
    for row, system in TABLES[name].rows.items():
        title = system.title + (" (not in the paper)" if system.extra else "")
        runs = by_system.get(known.rows.get((name, row), ""), [])
        if (name, row) in known.refused:
            lines.append(_line([title, f"not at this size: {known.refused[name, row]}", *[""] * (len(head) - 2)]))
            continue
        if not runs:
            lines.append(_line([title, "not run", *[""] * (len(head) - 2)]))
            continue
        base = by_system.get(known.rows.get((name, _base(name, row)), ""), [])
        gain = f"{100 * (mean(r.overall for r in runs) - mean(r.overall for r in base)):+.1f}" if base else ""
        shares = [_share([run.kinds[kind] for run in runs]) for kind in KINDS]
        lines.append(
            _line([title, _share([r.overall for r in runs]), gain, *shares, str(len(runs)), f"{runs[0].added:,}"])
        )
    return "\n".join(lines)


def _base(table: str, row: str) -> str:
    """The row with which the paper compares a row of this table."""
    if row.endswith("_vr"):
        return row.removesuffix("_vr")
    if f"{row}_vr" in TABLES[table].rows:
        return row
    return {"table4": "vision_remember", "table5b": "local"}.get(table, next(iter(TABLES[table].rows)))


def gains(setting: Setting, runs: Iterable[Run]) -> dict[int, float]:
    """The percentage points that Vision Remember adds to pooling, by compression, where both are finished."""
    rows, by_system = systems(setting).rows, _by_system(runs)
    means = {name: 100 * mean(run.overall for run in runs) for name, runs in by_system.items()}
    found = {}
    for ratio, (table, row) in RATIOS.items():
        with_vr, without = rows[table, f"{row}_vr"], rows[table, row]
        if with_vr in means and without in means:
            found[ratio] = means[with_vr] - means[without]
    return found


def plot(setting: Setting, runs: Iterable[Run], path: Path) -> None:
    """Draws accuracy against compression and writes the figure. Only this function needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, by_system = systems(setting).rows, _by_system(runs)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, suffix, marker in (("pooling", "", "o"), ("pooling + Vision Remember", "_vr", "s")):
        points = [
            (ratio, [100 * run.overall for run in by_system[rows[table, row + suffix]]])
            for ratio, (table, row) in RATIOS.items()
            if rows[table, row + suffix] in by_system
        ]
        axes.errorbar(
            [ratio for ratio, _ in points],
            [mean(values) for _, values in points],
            yerr=[_spread(values) for _, values in points],
            label=label,
            marker=marker,
            capsize=3,
        )
    if full := by_system.get(rows[UNCOMPRESSED]):
        axes.axhline(100 * mean(run.overall for run in full), color="grey", linestyle="--", label="uncompressed")
    axes.set_xticks(list(RATIOS), [f"1/{ratio}" for ratio in RATIOS])
    axes.set(xlabel="vision tokens that are left", ylabel="right answers, held-out images (%)", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _by_system(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.system, []).append(run)
    return found


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _share(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
