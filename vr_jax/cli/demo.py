"""`vr-jax demo`: trains systems with and without Vision Remember on generated pages, and compares them on one page."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Annotated

from vr_jax.cli.flags import Command, Flags, flag
from vr_jax.cli.signals import cleaned_up_on_signals
from vr_jax.data.demo.pages import KINDS
from vr_jax.demo import (
    HELD_OUT_PAGES,
    PAGES,
    REPORT,
    SYSTEMS,
    SystemResult,
    compare,
    find_systems,
    first_that_remembers,
)
from vr_jax.errors import UserError
from vr_jax.fields import MAX_INT, NonNegativeInt, PositiveInt, Range
from vr_jax.path_text import PathText
from vr_jax.storage import (
    COMPLETE_MARKER,
    LOCK_FILE,
    Path,
    UploadedFolder,
    as_path,
    complete_directory,
    directory_lock,
    file_errors,
    remove_folder,
    write_text,
)

# The kinds take turns, and the page has a score for each of them.
HeldOut = Annotated[int, Range(len(KINDS), MAX_INT)]
MARKER = ".vr_jax_demo"  # only a folder that the demo itself made is emptied
MODEL = "model"  # The first one with Vision Remember, at a short path.


@dataclass(frozen=True, kw_only=True)
class DemoFlags(Flags):
    """The flags of `vr-jax demo`."""

    workdir: PathText = flag(
        "runs/demo", "Folder for everything that the demo writes. It is emptied first.", metavar="DIR"
    )
    steps: PositiveInt | None = flag(None, "Number of updates of each phase. The default is the config's.")
    pages: PositiveInt = flag(PAGES, "Number of pages to train on.")
    held_out: HeldOut = flag(
        HELD_OUT_PAGES,
        f"Number of held-out pages with one question each, at least {len(KINDS)}: one of each kind.",
    )
    seed: NonNegativeInt = flag(0, "Seed of the pages, of fresh parameters and of the order of the data.")
    systems: str = flag(
        ",".join(system.name for system in SYSTEMS), "Names of the systems to compare, with commas between."
    )
    jobs: PositiveInt = flag(2, "Number of systems that are trained at the same time, each on about one CPU core.")


def run(flags: DemoFlags) -> None:
    """Trains, evaluates and compares."""
    with cleaned_up_on_signals():  # the processes that train must not outlive this one
        demo(flags)


def demo(flags: DemoFlags) -> list[SystemResult]:
    """Trains, evaluates and compares; returns the results of the systems."""
    start = time.perf_counter()
    systems = find_systems(flags.systems.split(","))
    target = as_path(flags.workdir)
    # The processes of the demo share a folder of a disk; what is in it goes to a bucket at the end.
    with directory_lock(target), UploadedFolder(target) as files:
        workdir = files.local
        _empty(target)
        results = compare(
            workdir,
            seed=flags.seed,
            steps=flags.steps,
            pages=flags.pages,
            held_out=flags.held_out,
            systems=systems,
            jobs=flags.jobs,
            report=_say,
        )
        files.upload()
        with complete_directory(target / MODEL) as written, UploadedFolder(written) as model:
            ignored = shutil.ignore_patterns(COMPLETE_MARKER)
            shutil.copytree(first_that_remembers(results).model, model.local, ignore=ignored, dirs_exist_ok=True)
            model.upload()
    _say(
        f"\n{time.perf_counter() - start:.0f} s; scores, loss curves, answers and heat maps: {target / REPORT}; a "
        f"model with Vision Remember: {target / MODEL}"
    )
    return results


def _say(line: str) -> None:
    print(line, flush=True)


def _empty(workdir: Path) -> None:
    """Empties the folder of an earlier demo."""
    with file_errors(f"{workdir} cannot be emptied"):
        inside = [path for path in workdir.iterdir() if path.name != LOCK_FILE]
        if inside and not (workdir / MARKER).exists():
            raise UserError(f"{workdir} holds other files; give an empty --workdir")
        for path in inside:
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            elif path.name != MARKER:
                path.unlink()
        write_text(workdir / MARKER, "")


COMMAND = Command(
    summary="Compare tiny models with and without Vision Remember.",
    flags=DemoFlags,
    run=run,
    details="""The demo needs no data and no download, and starts anew each time. It takes minutes on two CPU cores, and
prints the commands that it runs.""",
    examples=("vr-jax demo", "vr-jax demo --steps=20"),
    interrupted="interrupted; the same command starts the demo anew",
    verbose=True,
)
