"""A whole comparison: the pages, the pretrained parts, the trainings, the scores and the page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from vr_jax.demo.commands import HELD_OUT_PAGES, PAGES, Workers, prepare_steps, system_steps
from vr_jax.demo.results import SystemResult, read_result, write_page
from vr_jax.demo.systems import SYSTEMS, DemoSystem
from vr_jax.storage import Path, make_folder

REPORT = "report.html"


def compare(
    workdir: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    pages: int = PAGES,
    held_out: int = HELD_OUT_PAGES,
    systems: Sequence[DemoSystem] = SYSTEMS,
    jobs: int = 2,
    report: Callable[[str], None] = print,
) -> list[SystemResult]:
    """Trains, scores and compares systems.

    Args:
        workdir: A new folder for everything that is written.
        seed: The seed of the pages, of fresh parameters and of the order of the data.
        steps: The updates of each phase; None for those of configs/reading.py.
        pages: The number of pages to train on.
        held_out: The number of held-out pages.
        systems: The systems, of which at least one has Vision Remember.
        jobs: The number of systems that are trained at the same time, each on about one CPU core.
        report: Receives the commands as they are run, and the table of the scores.

    Returns:
        The results of the systems.

    Raises:
        UserError: A command failed.
    """
    start = time.perf_counter()
    make_folder(workdir)
    chains = [system_steps(system, workdir, seed=seed, steps=steps) for system in systems]
    with Workers(jobs, report) as workers:
        workers.run([[step] for step in prepare_steps(workdir, pages=pages, held_out=held_out, seed=seed)])
        workers.run(chains)
    results = [read_result(system, workdir) for system in systems]
    settings = {
        "pages to train on": str(pages),
        "held-out pages": str(held_out),
        "seed": str(seed),
        "updates of each phase": "those of configs/reading.py" if steps is None else str(steps),
        "time": f"{time.perf_counter() - start:.0f} s, set-up of the environment not included",
        "machine": f"{os.cpu_count()} CPU cores, {jobs} systems at a time",
    }
    for chain in chains:
        settings |= {step.name: step.shown for step in chain}
    write_page(workdir / REPORT, results, workdir, settings)
    report(score_table(results))
    return results


def score_table(results: Sequence[SystemResult]) -> str:
    """The scores of all systems as lines of text."""
    columns = list(results[0].columns)
    lines = [f"{'accuracy on held-out pages, %':<38}" + "".join(f"{name:>8}" for name in columns)]
    for one in sorted(results, key=lambda one: (one.system.ratio, one.system.title)):
        name = f"1/{one.system.ratio} {one.system.title}"
        lines.append(f"{name:<38}" + "".join(f"{one.columns[column].score:>8.1f}" for column in columns))
    baselines = (results[0].columns[column].baseline or 0.0 for column in columns)
    lines.append(f"{'always the most frequent answer':<38}" + "".join(f"{one:>8.1f}" for one in baselines))
    return "\n".join(lines)
