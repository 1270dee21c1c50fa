"""The commands of the demo, which are those that a user would type, and how they are run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
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

from vr_jax.data.demo.reading import CAPTIONS, HELD_OUT, QUESTIONS, TRAIN
from vr_jax.demo.systems import DemoSystem
from vr_jax.errors import UserError
from vr_jax.storage import Path, make_folder
from vr_jax.training import EXPORT_FOLDER

CONFIG = "configs/reading.py"
DATA, START = "data", "start"  # folders
LOG = "log.txt"
PHASES = ("phase1", "phase2")
PAGES, HELD_OUT_PAGES, TURNS = 3_200, 500, 3
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
        """The same command as arguments of Python."""
        program, *rest = self.words
        return [*(["-m", "vr_jax"] if program == "vr-jax" else []), *rest]


def prepare_steps(workdir: Path, *, pages: int, held_out: int, seed: int) -> list[Step]:
    """The commands that draw the pages and convert the pretrained parts. They do not depend on each other."""
    parts = resources.files("vr_jax.data.demo") / "pretrained"
    write = (
        f"from vr_jax.data.demo.reading import write_reading; write_reading({str(workdir / DATA)!r}, "
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


class Workers:
    """Processes that run commands. Each runs many, so that imports are paid for once (`vr_jax.demo.worker`)."""

    def __init__(self, jobs: int, report: Callable[[str], None]) -> None:
        """Starts the processes.

        Args:
            jobs: The number of processes.
            report: Receives each command before it runs, and the time that it took.
        """
        self._report = report
        self._stopped = threading.Event()
        self._workers = [_Worker(self._stopped, number, jobs) for number in range(jobs)]

    def __enter__(self) -> Workers:
        """Nothing more is needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the processes."""
        self._stopped.set()
        for worker in self._workers:
            worker.end()

    def run(self, chains: Sequence[Sequence[Step]]) -> None:
        """Runs chains of commands, as many at a time as there are processes, and each chain in its order.

        Raises:
            UserError: A command failed. No further command is started, and those that run are ended.
        """
        waiting, lock = iter(chains), threading.Lock()

        def work(worker: _Worker) -> None:
            try:
                while not self._stopped.is_set():
                    with lock:
                        chain = next(waiting, None)
                    if chain is None:
                        return
                    for step in chain:
                        if not self._stopped.is_set():
                            worker.run(step, self._report)
            except BaseException:
                self._stopped.set()
                raise

        with ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                # All are awaited in order; a failure of any of them stops the others.
                for future in [pool.submit(work, worker) for worker in self._workers]:
                    future.result()
            except BaseException:
                self._stopped.set()
                raise


class _Worker:
    """A process of `vr_jax.demo.worker`."""

    def __init__(self, stopped: threading.Event, number: int, jobs: int) -> None:
        """Starts the process.

        Args:
            stopped: When it is set, the command that runs is ended.
            number: The number of this process, from 0.
            jobs: The number of processes. Each gets its share of the CPU cores.
        """
        # The models are so small that an accelerator would only wait. Two processes could not share a TPU.
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "vr_jax.demo.worker", str(number), str(jobs)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        self._stopped = stopped

    def run(self, step: Step, report: Callable[[str], None]) -> None:
        """Runs a command.

        Raises:
            UserError: It failed.
        """
        make_folder(step.log.parent)
        report(f"$ {step.shown}")
        began = time.perf_counter()
        status = self._ask(json.dumps({"argv": step.argv, "log": str(step.log.absolute())}))
        if self._stopped.is_set():
            return
        if status:
            lines = " | ".join(_last_lines(step.log)) if step.log.exists() else "nothing"
            raise UserError(f"{step.name} ended with exit status {status}; {step.log} ends with: {lines}")
        report(f"  {step.name}: {time.perf_counter() - began:.0f} s")

    def _ask(self, request: str) -> int:
        """The exit status of a command, or 0 if the demo is stopped meanwhile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # The process has ended, which the loop below finds.
            print(request, file=self._process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not self._stopped.is_set():
                if selector.select(timeout=0.2):
                    answer = self._process.stdout.readline()
                    return int(answer) if answer else self._process.wait() or 1
        return 0

    def end(self) -> None:
        """Ends the process, gently at first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _last_lines(log: Path) -> Iterator[str]:
    with log.open(errors="replace") as lines:
        yield from deque((line.strip() for line in lines if line.strip()), maxlen=_LAST_LINES)
