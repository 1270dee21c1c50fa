"""Compares pooling, Vision Remember and TokenPacker on pages to read, with several seeds: docs/results/reading.md.

    python -m benchmarks.accuracy.reading [--seeds 0 1 2] [--workdir=runs/reading]

A seed changes the pages, the fresh parameters and the order of the data. A seed whose folder is complete is not run
again, so the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import arguments
from vr_jax.demo import REPORT, SYSTEMS, SystemResult, compare, read_result
from vr_jax.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- table: benchmarks/accuracy/reading.py -->", "<!-- end of the table -->"
SECONDS = "seconds.txt"


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--workdir", type=arguments.path, default=ROOT / "runs" / "reading")
    flags.add_argument("--page", type=arguments.path, default=ROOT / "docs" / "results" / "reading.md")
    flags.add_argument("--steps", type=int, help="updates of each phase; default: those of the config")
    flags.add_argument("--pages", type=int, help="pages to train on; default: those of the comparison")
    flags.add_argument("--held_out", type=int, help="held-out pages; default: those of the comparison")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the seeds that are missing, and writes the table."""
    options = parser().parse_args(argv)
    sizes = {name: value for name in ("steps", "pages", "held_out") if (value := getattr(options, name)) is not None}
    runs: dict[int, list[SystemResult]] = {}
    seconds: list[float] = []
    for seed in options.seeds:
        folder = options.workdir / str(seed)
        if not (folder / REPORT).exists():
            began = time.perf_counter()
            compare(folder, seed=seed, **sizes)
            write_text(folder / SECONDS, f"{time.perf_counter() - began:.0f}\n")
        runs[seed] = [read_result(system, folder) for system in SYSTEMS]
        seconds.append(float((folder / SECONDS).read_text()))
    text = options.page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(options.page, f"{before}{BEGIN}\n\n{table(runs, seconds)}\n\n{END}{after}")
    print(table(runs, seconds))
    return 0


def table(runs: dict[int, list[SystemResult]], seconds: Sequence[float]) -> str:
    """The mean score of every system by kind of page with all seeds of the overall score, and the gains."""
    first = next(iter(runs.values()))
    columns = list(first[0].columns)
    lines = [
        f"| system | {' | '.join(columns)} | all, seeds {', '.join(map(str, runs))} |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    order = sorted(range(len(SYSTEMS)), key=lambda k: (SYSTEMS[k].ratio, SYSTEMS[k].title))
    for number in order:
        of_seeds = [results[number] for results in runs.values()]
        means = (statistics.mean(one.columns[name].score for one in of_seeds) for name in columns)
        each = ", ".join(f"{one.columns['all'].score:.1f}" for one in of_seeds)
        title = f"1/{SYSTEMS[number].ratio} {SYSTEMS[number].title}"
        lines.append(f"| {title} | {' | '.join(f'{mean:.1f}' for mean in means)} | {each} |")
    baselines = (
        statistics.mean(results[0].columns[name].baseline or 0.0 for results in runs.values()) for name in columns
    )
    lines += [f"| always the most frequent answer | {' | '.join(f'{one:.1f}' for one in baselines)} | |", ""]
    lines += [
        f"| 1/9 pooling + Vision Remember, seed | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for seed, results in runs.items():
        (ours,) = (one for one in results if one.system.name == "vision_remember_9")
        lines.append(f"| {seed} | {' | '.join(f'{ours.columns[name].score:.1f}' for name in columns)} |")
    lines.append("")
    for ratio in (9, 16):
        gains = []
        for results in runs.values():
            by_name = {one.system.name: one.columns["all"].score for one in results}
            gains.append(by_name[f"vision_remember_{ratio}"] - by_name[f"pooling_{ratio}"])
        lines.append(
            f"Vision Remember against pooling at 1/{ratio}: {', '.join(f'{gain:+.1f}' for gain in gains)} points."
        )
    took = ", ".join(f"{one:.0f}" for one in seconds)
    versions = f"{platform.machine()}, jax {jax.__version__}, Python {platform.python_version()}"
    lines += ["", f"A run took {took} s without the set-up of the environment: {versions}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
