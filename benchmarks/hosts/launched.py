"""A tiny training in several processes below `vr-jax launch`, watched from outside: its processes, steps and lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 1800.0  # seconds for anything that is waited for; more is a hang
# The demo with one narrow layer each, which compiles in a second.
TINY = {
    "model.encoder.num_layers": 1,
    "model.encoder.hidden_size": 24,
    "model.encoder.intermediate_size": 32,
    "model.decoder.num_layers": 1,
    "model.decoder.hidden_size": 32,
    "model.decoder.intermediate_size": 32,
    "model.refusion": None,
    "model.vision_feature_layer": 1,
    "batch.tokens": 96,
    "batch.tiles": 2,
    "loss_chunk": 64,
    "tensorboard": False,
}


def train_command(workdir: Path, *, processes: int, steps: int, every: int) -> list[str]:
    """Returns the words of `train` for the tiny run, with one row of the batch for each process."""
    fields = {**TINY, "batch.rows": processes, "samples_per_step": processes, "steps": steps, "checkpoint.every": every}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train", f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={workdir}", *overrides]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a run: one CPU device for each process, compiled without optimisation."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **(changes or {}),
    }


class Launched:
    """A run below the launcher.

    Attributes:
        lines: What the launcher and the processes have written to standard error, with the time of each line.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        processes: int,
        steps: int,
        every: int,
        heartbeat: float,
        restarts: int = 5,
        changes: Mapping[str, str] | None = None,
    ):
        """Starts the run."""
        self.workdir = workdir
        command = train_command(workdir, processes=processes, steps=steps, every=every)
        launch = ["launch", f"--processes={processes}", f"--restarts={restarts}", "--pause=0.1", "--grace=90", "--"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vr_jax", *launch, *command],
            env=environment({"VR_JAX_HEARTBEAT_TIMEOUT": f"{heartbeat:g}", **(changes or {})}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def pids(self) -> dict[int, int]:
        """Returns the numbers of the running processes at the operating system, by their number in the run."""
        found = {}
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in map(int, path.read_text().split()):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            number = next((word.partition(b"=")[2] for word in words if word.startswith(b"JAX_PROCESS_ID=")), None)
            if number is not None:
                found[int(number)] = pid
        return found

    def step(self) -> int:
        """Returns the last step whose numbers are written."""
        return max((record["step"] for record in metrics(self.workdir)), default=0)

    def said(self, words: str) -> list[tuple[float, str]]:
        """Returns the lines with some words so far."""
        return [line for line in list(self.lines) if words in line[1]]

    def wait(self, condition: Callable[[], bool]) -> float:
        """Waits until a condition holds or the run has ended; returns the time."""
        end = time.monotonic() + DEADLINE
        while not condition() and self.process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError("\n".join(line for _, line in self.lines[-50:]))
            time.sleep(0.02)
        return time.monotonic()

    def finish(self) -> int:
        """Waits for the end and returns the exit status."""
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code

    def close(self) -> None:
        """Ends what still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


@contextmanager
def launched(workdir: Path, **options: object) -> Iterator[Launched]:
    """Runs for the length of the block; see `Launched`."""
    run = Launched(workdir, **options)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        run.close()


def metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the complete lines of a run's metrics."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def series(workdir: Path) -> list[tuple[float, ...]]:
    """Returns step, loss, norm of the gradient and learning rate of every update."""
    return [tuple(record[name] for name in ("step", "loss", "grad_norm", "lr")) for record in metrics(workdir)]
