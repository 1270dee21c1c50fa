"""`vr-jax demo`: trains systems with and without Vision Remember on generated pages, and compares them on one page."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.demo import (
    HELD_OUT_PAGES,
    PAGES,
    SYSTEMS,
    SystemResult,
    prepare_steps,
    read_result,
    run_systems,
    run_together,
    system_steps,
    write_page,
)
from vr_jax.errors import UserError
from vr_jax.fields import NonNegativeInt, PositiveInt
from vr_jax.path_text import PathText
from vr_jax.storage import LOCK_FILE, as_path, directory_lock, file_errors, remove_folder, write_text

MARKER = ".vr_jax_demo"  # only a folder that the demo itself made is emptied
REPORT = "report.html"
MODEL = "model"  # The first system's, at a short path.


@dataclass(frozen=True, kw_only=True)
class DemoFlags(Flags):
    """The flags of `vr-jax demo`."""

    workdir: PathText = flag(
        "runs/demo", "Folder for everything that the demo writes. It is emptied first.", metavar="DIR"
    )
    overrides: tuple[str, ...] = flag((), "Sets a field of the config of all runs.", overrides=True)
    steps: PositiveInt | None = flag(None, "Number of updates of each phase. The default is the config's.")
    pages: PositiveInt = flag(PAGES, "Number of pages to train on.")
    held_out: PositiveInt = flag(HELD_OUT_PAGES, "Number of held-out pages, each with one question.")
    seed: NonNegativeInt = flag(0, "Seed of the pages, of fresh parameters and of the order of the data.")
    jobs: PositiveInt = flag(2, "Number of systems that are trained at the same time, each on about one CPU core.")


def run(flags: DemoFlags) -> None:
    """Trains, evaluates and compares."""
    demo(flags)


def demo(flags: DemoFlags) -> list[SystemResult]:
    """Trains, evaluates and compares; returns the results of the systems."""
    start = time.perf_counter()
    workdir = Path(as_path(flags.workdir))
    _empty(workdir)
    run_together(prepare_steps(workdir, pages=flags.pages, held_out=flags.held_out, seed=flags.seed), flags.jobs, _say)
    chains = [
        system_steps(system, workdir, seed=flags.seed, steps=flags.steps, overrides=flags.overrides)
        for system in SYSTEMS
    ]
    run_systems(chains, flags.jobs, _say)
    results = [read_result(system, workdir) for system in SYSTEMS]
    settings = {
        "pages to train on": str(flags.pages),
        "held-out pages": str(flags.held_out),
        "seed": str(flags.seed),
        "updates of each phase": "those of configs/reading.py" if flags.steps is None else str(flags.steps),
        "time": f"{time.perf_counter() - start:.0f} s, set-up of the environment not included",
        "machine": f"{os.cpu_count()} CPU cores, {flags.jobs} systems at a time",
    }
    for chain in chains:
        settings |= {step.name: step.shown for step in chain}
    shutil.copytree(results[0].model, workdir / MODEL)
    write_page(workdir / REPORT, results, workdir, settings)
    _print_scores(results, time.perf_counter() - start, workdir / REPORT)
    return results


def _say(line: str) -> None:
    print(line, flush=True)


def _print_scores(results: Sequence[SystemResult], seconds: float, report: Path) -> None:
    columns = list(results[0].columns)
    print(f"\n{'accuracy on held-out pages, %':<38}" + "".join(f"{name:>8}" for name in columns))
    for one in sorted(results, key=lambda one: (one.system.ratio, one.system.title)):
        name = f"1/{one.system.ratio} {one.system.title}"
        print(f"{name:<38}" + "".join(f"{one.columns[column].score:>8.1f}" for column in columns))
    baselines = (results[0].columns[column].baseline or 0.0 for column in columns)
    print(f"{'always the most frequent answer':<38}" + "".join(f"{one:>8.1f}" for one in baselines))
    print(f"\n{seconds:.0f} s; scores, loss curves, answers and heat maps: {report}")


def _empty(workdir: Path) -> None:
    """Empties the folder of an earlier demo, unless another one is running in it now."""
    with directory_lock(workdir), file_errors(f"{workdir} cannot be emptied"):
        inside = [path for path in workdir.iterdir() if path.name != LOCK_FILE]
        if inside and not (workdir / MARKER).exists():
            raise UserError(f"{workdir} holds other files; give an empty --workdir")
        for path in inside:
            if path.is_dir() and not os.path.islink(path):
                remove_folder(path)
            elif path.name != MARKER:
                path.unlink()
        write_text(workdir / MARKER, "")


COMMAND = Command(
    summary="Train tiny models with and without Vision Remember, and compare them on one page.",
    flags=DemoFlags,
    run=run,
    details="""The demo needs no data and no download, and starts anew each time. It takes minutes on two CPU cores, and
prints the commands that it runs.""",
    examples=("vr-jax demo", "vr-jax demo --steps=20"),
    verbose=True,
)
