"""Injects failures into a training of several processes, and measures what is lost and how long recovery takes.

    python -m benchmarks.hosts.recovery [--only KIND,...] [--page docs/results/failures.md]

Each failure is injected into a tiny training in four processes below `vr-jax launch`. The parameters and the metrics of
all steps are then compared with those of a run without failures, bit for bit. The first three kinds are drawn together:
ten failures of random kinds, of random processes and at random steps (--seed).

* kill: `kill -9`, as the kernel does where memory is out; also of process 0, which holds JAX's coordination service.
* terminate: SIGTERM to one process, as a cluster asks for a host.
* stop: SIGSTOP for longer than the heartbeat timeout.
* full_disk: the disk of the run is full at a save. Somebody frees space and starts the same command again.
* never_starts: one process is missing at the start.
* clocks: the clocks of the processes are an hour apart, and process 0 is killed.

With --page, the rows of the table between the markers of that page are replaced by what was measured; those of other
kinds stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import arguments
from benchmarks.hosts.launched import environment, launched, metrics, series, train_command
from vr_jax.processes.supervisor import free_port

RANDOM = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
NAMES = {
    "kill": "`kill -9` of a random process",
    "terminate": "SIGTERM to a random process",
    "stop": "SIGSTOP of a random process, for longer than the heartbeat timeout",
    "full_disk": "the disk is full at a save; space is freed, and the same command is started again",
    "never_starts": "a process never starts; the same command is started again on all",
    "clocks": "clocks an hour apart (of Python), and `kill -9` of process 0",
}
BEGIN, END = "<!-- begin of the measured table -->", "<!-- end of the measured table -->"
AGAIN = "are started again"
# Shifts the clock of a process by as many hours as its number.
CLOCKS = """
import os, time
_real, _shift = time.time, 3600 * int(os.environ.get("JAX_PROCESS_ID", 0))
time.time = lambda: _real() - _shift
"""


@dataclass(frozen=True)
class Size:
    """How large the runs are."""

    processes: int
    steps: int
    every: int
    heartbeat: float
    failures: int
    seed: int


@dataclass
class Measured:
    """What was measured of one kind of failure.

    Attributes:
        lost: What differs from the run without failures.
        ended: Seconds from each failure until all processes had ended.
        recovered: Seconds from each failure until the first step that had not been done before.
        redone: Updates that were done again after each.
        said: What the others said, as an example.
    """

    lost: str = ""
    ended: list[float] = field(default_factory=list)
    recovered: list[float] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    said: str = ""


def run_whole(folder: Path, size: Size) -> Path:
    """Runs without failures and returns the workdir."""
    workdir = folder / "whole"
    with launched(workdir, **_options(size)) as run:
        code = run.finish()
        if code:
            raise RuntimeError("\n".join(line for _, line in run.lines))
    return workdir


def _options(size: Size) -> dict[str, float]:
    return {"processes": size.processes, "steps": size.steps, "every": size.every, "heartbeat": size.heartbeat}


def random_failures(folder: Path, size: Size, whole: Path) -> dict[str, Measured]:
    """Injects failures of random kinds into one run, at random moments."""
    draw = random.Random(size.seed)
    kinds = [list(RANDOM)[k % len(RANDOM)] for k in range(size.failures)]
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(1, size.steps - 1), size.failures))
    found = {kind: Measured() for kind in RANDOM if kind in kinds}
    workdir = folder / "failures"
    with launched(workdir, **_options(size)) as run:
        reached = 0
        for kind, moment in zip(kinds, moments, strict=True):
            run.wait(lambda moment=moment, reached=reached: run.step() >= max(moment, reached + 1))
            time.sleep(draw.uniform(0, 0.2))
            victim = draw.randrange(size.processes)
            reached = _inject(run, victim, RANDOM[kind], found[kind], size)
        code = run.finish()
        lost = compare(whole, workdir) if code == 0 else f"it ended with {code}: {run.lines[-1][1]}"
    for one in found.values():
        one.lost = lost
    return found


def _inject(run, victim: int, number: int, found: Measured, size: Size) -> int:  # type: ignore[no-untyped-def]
    """Sends a signal to a process, waits for the recovery, and returns the step that had been reached."""
    restarts = len(run.said(AGAIN))
    step = run.step()
    begin = time.monotonic()
    pid = run.pids().get(victim)
    if pid is None:  # the run is at its end
        return step
    os.kill(pid, number)
    run.wait(lambda: len(run.said(AGAIN)) > restarts)
    if len(run.said(AGAIN)) == restarts:
        return step
    ended, _ = run.said(AGAIN)[restarts]
    reached = max(step, run.step())
    recovered = run.wait(lambda: run.step() > reached)
    continued = run.said("continuing from step")
    begins = [int(text.rpartition(" ")[2]) for moment, text in continued if moment > ended]
    found.ended.append(ended - begin)
    found.recovered.append(recovered - begin)
    found.redone.append(reached - (begins[0] if begins else 0))
    lost = [text for moment, text in run.lines if moment > begin and " is lost" in text]
    found.said = found.said or (lost[0] if lost else "")
    return reached


def full_disk(folder: Path, size: Size, whole: Path) -> Measured:
    """Fills a small disk in the middle of a run, and frees it again."""
    found = Measured()
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        workdir, filler = disk / "run", disk / "filler"
        with launched(workdir, **_options(size)) as run:
            run.wait(lambda: run.step() > size.every)
            begin = time.monotonic()
            with open(filler, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * (1 << 16))
                except OSError:
                    pass
            code = run.finish()
            found.ended.append(time.monotonic() - begin)
            reached = run.step()
            lines = [text for _, text in run.lines if "No space left" in text or "no room" in text]
            found.said = lines[0] if lines else f"exit code {code}"
        filler.unlink()
        with launched(workdir, **_options(size)) as run:
            found.recovered.append(run.wait(lambda: run.step() > reached) - begin)
            begins = [int(text.rpartition(" ")[2]) for _, text in run.said("continuing from step")]
            found.redone.append(reached - (begins[0] if begins else 0))
            found.lost = compare(whole, workdir) if run.finish() == 0 else run.lines[-1][1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return found


def never_starts(folder: Path, size: Size, whole: Path) -> Measured:
    """Starts all processes but the last, then all of them below the launcher."""
    found = Measured()
    workdir = folder / "never"
    address = f"127.0.0.1:{free_port()}"
    command = train_command(workdir, processes=size.processes, steps=size.steps, every=size.every)
    changes = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(size.processes)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "vr_jax", *command, "--start_timeout=5"],
            env=environment({**changes, "JAX_PROCESS_ID": str(number)}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(size.processes - 1)
    ]
    while processes[0].poll() is None and not _listens(address):
        time.sleep(0.05)
    begin = time.monotonic()  # JAX is imported, and process 0 waits for the others
    ends = [(process.communicate()[1].strip(), process.returncode) for process in processes]
    found.ended.append(time.monotonic() - begin)
    found.said = ends[0][0]
    assert all(code == 75 for _, code in ends), ends
    with launched(workdir, **_options(size)) as run:
        found.recovered.append(run.wait(lambda: run.step() > 0) - begin)
        found.redone.append(0)
        found.lost = compare(whole, workdir) if run.finish() == 0 else run.lines[-1][1]
    return found


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return False
    return True


def clocks(folder: Path, size: Size, whole: Path) -> Measured:
    """Sets the clocks apart and kills process 0, which holds the lease on the folder."""
    found = Measured()
    (folder / "clocks").mkdir()
    (folder / "clocks" / "sitecustomize.py").write_text(CLOCKS)
    workdir = folder / "apart"
    path = environment()["PYTHONPATH"]
    changes = {"PYTHONPATH": os.pathsep.join([str(folder / "clocks"), path])}
    with launched(workdir, changes=changes, **_options(size)) as run:
        run.wait(lambda: run.step() > size.every)
        _inject(run, 0, signal.SIGKILL, found, size)
        found.lost = compare(whole, workdir) if run.finish() == 0 else run.lines[-1][1]
    return found


def compare(whole: Path, workdir: Path) -> str:
    """Returns what differs between two finished runs, or "nothing"."""
    import numpy as np  # JAX is imported after the processes have been started.
    from flax import nnx

    from vr_jax.model_directory import load_model

    if series(whole) != series(workdir):
        steps = sorted({record["step"] for record in metrics(whole)} ^ {record["step"] for record in metrics(workdir)})
        return f"the metrics differ{f' (steps {steps})' if steps else ''}"
    states = [nnx.to_pure_dict(nnx.state(load_model(folder / "model"))) for folder in (whole, workdir)]
    flat = [dict(nnx.traversals.flatten_mapping(state)) for state in states]
    if flat[0].keys() != flat[1].keys():
        return "the parameters have other names"
    different = [name for name in flat[0] if not np.array_equal(*(np.asarray(one[name]) for one in flat))]
    return f"parameters differ: {different}" if different else "nothing"


OTHERS: dict[str, Callable[[Path, Size, Path], Measured]] = {
    "full_disk": full_disk,
    "never_starts": never_starts,
    "clocks": clocks,
}


def row(kind: str, found: Measured) -> str:
    """Returns the row of the table for a kind of failure."""

    def seconds(values: Sequence[float]) -> str:
        if not values:
            return "-"
        middle = f"{statistics.median(values):.1f} s"
        return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"

    redone = f"{statistics.median(found.redone):g}" if found.redone else "-"
    count = len(found.ended)
    cells = [NAMES[kind], count, found.lost, redone, seconds(found.ended), seconds(found.recovered)]
    return f"| {' | '.join(map(str, cells))} |"


def write_page(page: Path, rows: dict[str, str]) -> None:
    """Replaces the rows of some kinds between the markers of a page."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = table.strip("\n").split("\n")
    for line in rows.values():
        begin = line.partition(" | ")[0]
        at = next((k for k, old in enumerate(lines) if old.startswith(begin)), None)
        lines = [*lines, line] if at is None else [*lines[:at], line, *lines[at + 1 :]]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the arguments."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", default="random,full_disk,never_starts,clocks", help="kinds, with commas between")
    found.add_argument("--processes", type=int, default=4)
    found.add_argument("--steps", type=int, default=200)
    found.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    found.add_argument("--heartbeat", type=float, default=5.0, help="heartbeat timeout in seconds")
    found.add_argument("--failures", type=int, default=10, help="number of random failures")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--page", type=arguments.path, help="a page whose rows are replaced")
    return found


def main(words: Sequence[str] | None = None) -> dict[str, Measured]:
    """Injects the failures, prints the table, and returns what was measured by kind."""
    flags = parser().parse_args(words)
    size = Size(flags.processes, flags.steps, flags.every, flags.heartbeat, flags.failures, flags.seed)
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="vr_jax_recovery_") as name:
        folder = Path(name)
        whole = run_whole(folder, size)
        for kind in flags.only.split(","):
            found |= (
                random_failures(folder, size, whole) if kind == "random" else {kind: OTHERS[kind](folder, size, whole)}
            )
            for one in found:
                print(row(one, found[one]), flush=True)
    for kind, one in found.items():
        print(json.dumps({"kind": kind, **vars(one)}))
    if flags.page is not None:
        write_page(flags.page, {kind: row(kind, one) for kind, one in found.items()})
    return found


if __name__ == "__main__":
    main()
