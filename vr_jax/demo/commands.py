"""The commands of the demo, which are those that a user would type, and how they are run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vr_jax.data.demo.reading import CAPTIONS, HELD_OUT, QUESTIONS, TRAIN
from vr_jax.demo.systems import DemoSystem
from vr_jax.errors import UserError
from vr_jax.storage import make_folder
from vr_jax.training import EXPORT_FOLDER

CONFIG = "configs/reading.py"
DATA, START = "data", "start"  # folders
LOG = "log.txt"
PHASES = ("phase1", "phase2")
PAGES, HELD_OUT_PAGES, TURNS = 8_000, 1_000, 3
SECONDS_TO_END = 5.0  # how long a command that is ended may take to end by itself
_LAST_LINES = 3  # The lines of a log that an error message shows.


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What the command does, in a few words.
        words: The command as a user types it, word by word.
        log: The file that its output is added to.
    """

    name: str
    words: tuple[str, ...]
    log: Path

    @property
    def shown(self) -> str:
        """The command as one line for a shell."""
        return shlex.join(self.words)

    @property
    def argv(self) -> list[str]:
        """The same command with the Python that runs now."""
        program, *rest = self.words
        return [sys.executable, *(["-m", "vr_jax"] if program == "vr-jax" else []), *rest]


def prepare_steps(workdir: Path, *, pages: int, held_out: int, seed: int) -> list[Step]:
    """The commands that draw the pages and convert the pretrained parts. They do not depend on each other."""
    parts = resources.files("vr_jax.data.demo") / "pretrained"
    write = (
        f"from vr_jax.data.demo.reading import write_reading; write_reading({json.dumps(str(workdir / DATA))}, "
        f"pages={pages}, held_out={held_out}, turns={TURNS}, seed={seed})"
    )
    convert = (f"--encoder={parts / 'siglip'}", f"--decoder={parts / 'qwen2'}", f"--to={workdir / START}")
    return [
        Step("draw the pages", ("python", "-c", write), workdir / "pages.txt"),
        Step("convert the pretrained parts", ("vr-jax", "convert", "import", *convert), workdir / "convert.txt"),
    ]


def system_steps(
    system: DemoSystem, workdir: Path, *, seed: int, steps: int | None = None, overrides: Sequence[str] = ()
) -> list[Step]:
    """The commands that train one system in two phases and score it, in this order.

    Args:
        system: The system.
        workdir: The folder of the demo.
        seed: The seed of the fresh parameters and of the order of the data.
        steps: The updates of each phase; None for those of the config.
        overrides: Further fields of the config as `field=value`, for both phases.
    """
    folder, train = workdir / system.name, workdir / DATA / TRAIN
    changes = [f"seed={seed}", *([] if steps is None else [f"steps={steps}"]), *overrides]
    found = []
    start = workdir / START
    for phase, records in zip(PHASES, (CAPTIONS, QUESTIONS), strict=True):
        words = (
            f"--config={CONFIG}:{system.name}_{phase}",
            f"--workdir={folder / phase}",
            f"--config.init_from={start}",
            f"--config.data.path={train / records}",
            *(f"--config.{change}" for change in changes),
        )
        found.append(Step(f"{system.name}, {phase}", ("vr-jax", "train", *words), folder / LOG))
        start = folder / phase / EXPORT_FOLDER
    words = (
        f"--checkpoint={start}",
        "--benchmark=chartqa",
        f"--data={workdir / DATA / HELD_OUT}",
        f"--output={folder / 'eval'}",
        "--batch_size=100",
        "--report_items=0",
    )
    return [*found, Step(f"{system.name}, evaluation", ("vr-jax", "eval", *words), folder / LOG)]


def run_systems(chains: Sequence[Sequence[Step]], jobs: int, report: Callable[[str], None]) -> None:
    """Runs chains of commands, `jobs` chains at a time. The commands of a chain run one after another.

    Raises:
        UserError: A command failed. No further command is started.
    """
    stopped = threading.Event()

    def chain(steps: Sequence[Step]) -> None:
        for step in steps:
            if stopped.is_set():
                return
            try:
                _run(step, report, stopped)
            except BaseException:
                stopped.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            # The results are awaited in order; a failure anywhere stops the others at their next command.
            for _ in pool.map(chain, chains):
                pass
        except BaseException:
            stopped.set()
            raise


def run_together(steps: Sequence[Step], jobs: int, report: Callable[[str], None]) -> None:
    """Runs commands that do not depend on each other, `jobs` at a time.

    Raises:
        UserError: A command failed.
    """
    run_systems([[step] for step in steps], jobs, report)


def _run(step: Step, report: Callable[[str], None], stopped: threading.Event) -> None:
    make_folder(step.log.parent)
    report(f"$ {step.shown}")
    began = time.perf_counter()
    # The models are so small that an accelerator would only wait. Two processes could not share a TPU.
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with step.log.open("a") as log:
        process = subprocess.Popen(step.argv, stdout=log, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None and not stopped.wait(0.2):
                pass
        finally:
            _end(process)
    if stopped.is_set():
        return
    if process.returncode:
        lines = " | ".join(_last_lines(step.log))
        raise UserError(f"{step.name} ended with exit status {process.returncode}; {step.log} ends with: {lines}")
    report(f"  {step.name}: {time.perf_counter() - began:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, gently at first."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_lines(log: Path) -> Iterator[str]:
    with log.open(errors="replace") as lines:
        yield from deque((line.strip() for line in lines if line.strip()), maxlen=_LAST_LINES)
