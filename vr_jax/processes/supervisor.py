"""Runs the processes of one run on this machine, and starts all of them again when one is lost (a leaf module).

An attempt starts every process with a coordinator port of its own. When one of them has ended without success, the
others end by themselves (`vr_jax.processes.liveness`); those that do not are killed. What follows depends on how they
ended:

* Exit code 75, or a signal: all are started again after a pause that doubles. The pause and the count of restarts begin
  anew whenever an attempt continued from a later step than the one before (`report_start`).
* Any other exit code: something has to be mended first, so nothing is started again.

A process is killed with all that it has started, and when the supervisor itself is killed.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from vr_jax.errors import EXIT_AGAIN, EXIT_DONE, EXIT_USER_ERROR

PROGRESS_VARIABLE = "VR_JAX_PROGRESS_FILE"  # the file to which a run writes the step from which it continues
MAX_PAUSE = 60.0  # seconds between two attempts, at most
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the signals that ask to stop
_LOOK = 0.1  # seconds between two looks at the processes
# Becomes the command given to it, after it has asked the kernel for SIGKILL when its parent ends (PR_SET_PDEATHSIG).
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_LONGEST_LINE = 1 << 16  # bytes that are held until a line is complete; a longer one becomes several
_LINE_ENDS = re.compile(rb"(?<=[\n\r])")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is run, and how often it is started again.

    Attributes:
        command: The program and its arguments.
        processes: Number of processes.
        restarts: Number of restarts without progress after which it is given up.
        pause: Seconds before the first restart; each further one without progress waits twice as long.
        grace: Seconds that the other processes have to end by themselves when one has ended without success.
    """

    command: Sequence[str]
    processes: int
    restarts: int
    pause: float = 1.0
    grace: float = 60.0


def report_start(step: int) -> None:
    """Tells the supervisor of this process, if there is one, from which step a run continues.

    Args:
        step: The step of the checkpoint, 0 for a new run.
    """
    if name := os.environ.get(PROGRESS_VARIABLE):
        with suppress(OSError):  # It only counts restarts.
            Path(name).write_text(str(step))


class _Process:
    """A process of an attempt, with what it has printed of lines that are not complete."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str]):
        self.number = number
        self.killed = False
        self._popen = subprocess.Popen(
            [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a group of its own, which is killed as a whole
        )
        self.pid = self._popen.pid
        self.pipes: tuple[Any, Any] = (self._popen.stdout, self._popen.stderr)
        self.rest = dict.fromkeys(self.pipes, b"")

    @property
    def code(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._popen.returncode is None:
            state = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is None:
                return None
            self._kill_group()  # what it has left behind, while its number cannot be another's
            self._popen.wait()
        return self._popen.returncode

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self._popen.pid, number)

    def kill(self) -> None:
        """Kills the process and all that it has started, if it still runs."""
        if self.code is None:
            self.killed = True
            self._kill_group()
            self._popen.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, so that it would stay for ever."""
        try:
            with open(f"/proc/{self._popen.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def how(self) -> str:
        """How it ended, in words."""
        code = self.code
        assert code is not None
        if self.killed:
            return "had to be killed"
        if code < 0:
            try:
                return f"died of {signal.Signals(-code).name}"
            except ValueError:
                return f"died of signal {-code}"
        return f"ended with exit code {code}"


class Supervisor:
    """Runs the processes of a plan until they are done, cannot be continued, or are stopped."""

    def __init__(self, plan: Plan, say: Say, output: BinaryIO, errors: BinaryIO):
        """Prepares a run.

        Args:
            plan: What is run.
            say: Takes the lines about restarts and the last line.
            output: Where the processes' standard output goes, with their numbers in front of each line.
            errors: The same for standard error.
        """
        self._plan, self._say, self._streams = plan, say, (output, errors)
        self._asked: list[int] = []  # signals that asked to stop
        self._restarts = 0

    def run(self) -> int:
        """Runs the processes and returns the exit status.

        Returns:
            0 if all processes succeeded, 75 if they were stopped, the code of a process that must not be started again,
            or 2 after too many restarts without progress.
        """
        with tempfile.TemporaryDirectory(prefix="vr_jax_launch_") as folder, self._signals():
            progress = Path(folder) / "step"
            fruitless, reached = 0, -1
            while True:
                processes = self._attempt(progress)
                codes = [process.code for process in processes]
                step = int(progress.read_text() or 0) if progress.exists() else 0
                if step > reached:
                    fruitless, reached = 0, step
                if not any(codes):
                    return self._finish("done", EXIT_DONE)
                what = described(processes)
                # Those that were killed here had lost the others, or had not noticed that they were lost.
                final = [code for process, code in zip(processes, codes, strict=True) if not process.killed and code]
                final = [code for code in final if not may_continue(code)]
                if self._asked:  # A program that reports the signal as shells do has not failed by itself.
                    final = [code for code in final if code != 128 + signal.SIGTERM]
                if final:
                    return self._finish(
                        f"{what}; that has to be mended first (see the lines above)", int(final[0] or 0)
                    )
                if self._asked:
                    return self._stopped(f" ({what})")
                if fruitless >= self._plan.restarts:
                    tried = f" after {fruitless} restarts without progress" if fruitless else ""
                    return self._finish(f"given up{tried}: {what}", EXIT_USER_ERROR)
                pause = min(MAX_PAUSE, self._plan.pause * 2**fruitless)
                fruitless += 1
                self._restarts += 1
                self._say(
                    f"{what}; all are started again in {pause:g} s (restart {fruitless} of "
                    f"{self._plan.restarts} without progress)"
                )
                if not self._sleep(pause):
                    name = signal.Signals(self._asked[0]).name
                    return self._finish(
                        f"stopped by {name} between two attempts; the same command continues", EXIT_AGAIN
                    )

    def _stopped(self, when: str) -> int:
        name = signal.Signals(self._asked[0]).name
        return self._finish(f"stopped by {name}{when}; the same command continues", EXIT_AGAIN)

    def _finish(self, what: str, code: int) -> int:
        restarts = f" ({self._restarts} restart{'s' if self._restarts > 1 else ''})" if self._restarts else ""
        self._say(what + restarts)
        return code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Notes the signals that ask to stop, for the length of the block."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked.append(number)

        # A signal that is ignored, as SIGHUP is below `nohup`, stays so.
        asking = [number for number in _ASKING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in asking}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _sleep(self, seconds: float) -> bool:
        """Waits, and returns whether nobody has asked to stop."""
        end = time.monotonic() + seconds
        while not self._asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
        return not self._asked

    def _attempt(self, progress: Path) -> list[_Process]:
        """Runs all processes once; none is left when it returns."""
        plan = self._plan
        shared = {PROGRESS_VARIABLE: str(progress), "PYTHONUNBUFFERED": "1"}
        if plan.processes > 1:
            shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(plan.processes)}
        processes: list[_Process] = []
        try:
            with selectors.DefaultSelector() as selector:
                for number in range(plan.processes):
                    own = {"JAX_PROCESS_ID": str(number)} if plan.processes > 1 else {}
                    process = _Process(number, plan.command, {**os.environ, **shared, **own})
                    processes.append(process)
                    for pipe, stream in zip(process.pipes, self._streams, strict=True):
                        os.set_blocking(pipe.fileno(), False)
                        selector.register(pipe, selectors.EVENT_READ, (process, stream))
                numbers = ", ".join(str(process.pid) for process in processes)
                self._say(f"started {plan.processes} process{'es' if plan.processes > 1 else ''} (pid {numbers})")
                self._watch(processes, selector)
        finally:
            for process in processes:
                process.kill()
                for pipe in process.pipes:
                    pipe.close()
        return processes

    def _watch(self, processes: Sequence[_Process], selector: selectors.BaseSelector) -> None:
        """Copies output until all processes have ended, and ends those that do not follow the others."""
        passed_on = 0
        failed: float | None = None  # when the first has ended without success
        while True:
            running = [process for process in processes if process.code is None]
            for key, _ in selector.select(_LOOK if running else 0):
                process, stream = key.data
                if not self._copy(process, key.fileobj, stream):
                    selector.unregister(key.fileobj)
            if not running:
                for key in list(selector.get_map().values()):
                    process, stream = key.data
                    while self._copy(process, key.fileobj, stream, last=True):
                        pass
                return
            if len(self._asked) > passed_on:
                passed_on = len(self._asked)
                for process in running:
                    if passed_on > 1:  # asked again: at once
                        process.kill()
                    else:
                        process.send(signal.SIGTERM)  # with which a cluster asks too: a run saves and ends
            if failed is None and any(process.code for process in processes):
                failed = time.monotonic()
            if failed is not None:
                late = time.monotonic() - failed > self._plan.grace
                others_ended = len(running) < len(processes) and all(process.is_stopped() for process in running)
                if late or others_ended:
                    for process in running:
                        process.kill()

    def _copy(self, process: _Process, pipe: Any, stream: BinaryIO, *, last: bool = False) -> bool:
        """Copies what a process has printed, line by line; returns whether the pipe is open."""
        data: bytes | None
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            data = b"" if last else None
        *lines, rest = _LINE_ENDS.split(process.rest[pipe] + (data or b""))
        if len(rest) > _LONGEST_LINE or (rest and data == b""):
            lines, rest = [*lines, rest + b"\n"], b""
        process.rest[pipe] = rest
        for line in lines:
            stream.write(b"[%d] %s" % (process.number, line))
        stream.flush()
        return data != b""


def may_continue(code: int | None) -> bool:
    """Returns whether a process that ended so may be started again: by success, exit code 75 or a signal."""
    return code is None or code in (EXIT_DONE, EXIT_AGAIN) or code < 0


def described(processes: Sequence[_Process]) -> str:
    """Returns how the processes ended, e.g. "process 2 died of SIGKILL, processes 0 and 1 ended with exit code 75".

    Those that others ended with come last.
    """
    ways: dict[str, list[int]] = {}
    for process in sorted(processes, key=lambda process: process.code in (EXIT_DONE, EXIT_AGAIN)):
        ways.setdefault(process.how(), []).append(process.number)
    parts = []
    for way, numbers in ways.items():
        names = [str(number) for number in numbers]
        who = f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"
        parts.append(f"{who} {way}")
    return ", ".join(parts)


def free_port() -> int:
    """Returns a port of this machine that no program uses now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
