"""`make demo`: trains the tiny LLaVA-VR of configs/demo.py, scores it on held-out images and writes a report.

    python -m vr_jax.cli.demo --workdir=runs/demo [--steps=N] [--config=configs/demo.py]

Needs no data and no download; starts anew each time."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from vr_jax.cli.evaluate import EvalOptions, run
from vr_jax.compilation import use_compilation_cache
from vr_jax.evaluation.report import ScoreRow, score_rows, with_baselines, write_report
from vr_jax.settings.config_files import RecipeError, load_recipe
from vr_jax.training.loop import EXPORT_FOLDER, train
from vr_jax.training.metrics import METRICS_FILE, read_metrics

MARKER = ".vr_jax_demo"  # so that only a folder of the demo's own is emptied
REPORT = "report.html"
SHOWN = 10_000  # all items


class DemoError(ValueError):
    """One line for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vr_jax.cli.demo", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="emptied first")
    parser.add_argument("--config", default="configs/demo.py", help="FILE[:VARIANT]")
    parser.add_argument("--steps", type=int, help="updates; default: the config's")
    options = parser.parse_args(arguments)
    try:
        demo(options.config, options.workdir, options.steps)
    except (DemoError, RecipeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demo(config_file: str, workdir: Path, steps: int | None = None) -> list[ScoreRow]:
    """Trains, evaluates, reports. Raises RecipeError, and DemoError for a workdir with other files."""
    start = time.perf_counter()
    _log_to_stderr()
    use_compilation_cache()
    config = load_recipe(config_file)
    if steps is not None:
        if steps < 1:
            raise DemoError(f"--steps={steps}: expected at least 1")
        config.steps = steps
    _empty(workdir)
    train(config, workdir)
    trained = time.perf_counter()

    options = EvalOptions(
        checkpoint=workdir / EXPORT_FOLDER, benchmark="demo", output=workdir, batch_size=50, report_items=SHOWN
    )
    evaluation = run(options)
    items = evaluation.report_items
    rows = score_rows(items)
    settings = {
        "config": config_file,
        "steps": str(config.steps),
        "samples per step": str(config.samples_per_step),
        "training": f"{trained - start:.0f} s, set-up of the environment not included",
        "evaluation": f"{time.perf_counter() - trained:.0f} s",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    write_report(
        workdir / REPORT,
        title="LLaVA-VR demo: held-out charts, tables and words",
        summary=with_baselines(evaluation.summary, "demo", rows),
        items=items,
        losses=[(record["step"], record["loss"]) for record in read_metrics(workdir / METRICS_FILE)],
        settings=settings,
    )
    _print_scores(rows, time.perf_counter() - start, workdir / REPORT)
    return rows


def _print_scores(rows: Sequence[ScoreRow], seconds: float, report: Path) -> None:
    print(f"\n{'held-out images':<20} {'items':>6} {'accuracy':>9} {'majority answer':>16}")
    for row in rows:
        print(f"{row.name:<20} {row.count:>6} {row.score:>9.1%} {row.baseline:>16.1%}")
    times = rows[0].score / rows[0].baseline if rows[0].baseline else 0.0
    print(f"\n{times:.1f} x the majority answer; {seconds:.0f} s; images, answers, loss curve: {report}")


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("vr_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each save


def _empty(workdir: Path) -> None:
    if workdir.exists() and any(workdir.iterdir()):
        if not (workdir / MARKER).exists():
            raise DemoError(f"{workdir} holds other files; give an empty --workdir")
        shutil.rmtree(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / MARKER).touch()


if __name__ == "__main__":
    sys.exit(main())
