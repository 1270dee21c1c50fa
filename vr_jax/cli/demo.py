"""`vr-jax demo`: trains a tiny model on generated images, scores it on held-out ones and writes a report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.compilation import use_compilation_cache
from vr_jax.errors import UserError
from vr_jax.evaluation import ScoreRow, evaluate, score_rows, with_baselines, write_report
from vr_jax.fields import PositiveInt
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.settings import TRAINING, EvaluationSettings, load_config
from vr_jax.storage import LOCK_FILE, as_path, directory_lock, file_errors, refuse_buckets, remove_folder, write_text
from vr_jax.training import EXPORT_FOLDER, METRICS_FILE, read_metrics, train

MARKER = ".vr_jax_demo"  # only a folder that the demo itself made is emptied
REPORT = "report.html"
ALL_ITEMS = 10_000  # more than the held-out images have


@dataclass(frozen=True, kw_only=True)
class DemoFlags(Flags):
    """The flags of `vr-jax demo`."""

    workdir: PathText = flag(
        "runs/demo", "Folder for everything that the demo writes. It is emptied first.", metavar="DIR"
    )
    config: FileVariantText = flag("configs/demo.py", "Config file, or a packaged one.", metavar="FILE[:VARIANT]")
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    steps: PositiveInt | None = flag(None, "Number of updates. The default is the config's.")


def run(flags: DemoFlags) -> None:
    """Trains, evaluates and reports."""
    demo(flags)


def demo(flags: DemoFlags) -> list[ScoreRow]:
    """Trains, evaluates and reports; returns the scores of the kinds of images."""
    start = time.perf_counter()
    use_compilation_cache()
    workdir = as_path(flags.workdir)
    overrides = (*flags.overrides, *((f"steps={flags.steps}",) if flags.steps else ()))
    config = load_config(flags.config, overrides, sections=TRAINING)
    refuse_buckets(config)
    _empty(workdir)
    train(config, workdir)
    trained = time.perf_counter()

    evaluation = evaluate(
        EvaluationSettings(
            checkpoint=str(workdir / EXPORT_FOLDER),
            benchmark="demo",
            output=str(workdir),
            batch_size=50,
            report_items=ALL_ITEMS,
        )
    )
    items = evaluation.report_items
    rows = score_rows(items)
    settings = {
        "config": flags.config,
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
    summary="Train a tiny model on generated images, score it, write a report.",
    flags=DemoFlags,
    run=run,
    details="""The demo needs no data and no download, and starts anew each time. It takes minutes on two CPU cores.""",
    examples=("vr-jax demo", "vr-jax demo --steps=20"),
    verbose=True,
)
