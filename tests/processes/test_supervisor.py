"""Processes that are run, ended and started again, with programs that need no JAX."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vr_jax.processes.supervisor import Plan, Supervisor, report_start

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from vr_jax.processes.supervisor import report_start

number, folder = int(os.environ.get("JAX_PROCESS_ID", 0)), Path(sys.argv[1])
attempt = len(list(folder.glob(f"{number}.*")))
(folder / f"{number}.{attempt}").write_text(os.environ.get("JAX_COORDINATOR_ADDRESS", ""))
print("attempt", attempt, "of", os.environ.get("JAX_NUM_PROCESSES"))
"""


def supervised(folder, code, *, processes=2, restarts=2, grace=10.0):
    """Exit status, the supervisor's lines, and what the processes print."""
    lines, output, errors = [], io.BytesIO(), io.BytesIO()
    plan = Plan([sys.executable, "-c", PROGRAM + code, str(folder)], processes, restarts, pause=0.01, grace=grace)
    status = Supervisor(plan, lines.append, output, errors).run()
    started = [line for line in lines if re.fullmatch(r"started \d process(es)? \(pid [\d, ]+\)", line)]
    lines = [line for line in lines if line not in started]
    assert len(started) == len(lines)  # before what is said of the end of each attempt
    return status, lines, output.getvalue().decode().splitlines(), errors.getvalue().decode().splitlines()


@pytest.fixture(autouse=True)
def python_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def attempts(folder, number=0):
    return len(list(folder.glob(f"{number}.*")))


def test_lines_carry_the_number_of_their_process(tmp_path):
    code = "print('half', end=''); print('wrong', file=sys.stderr); print('50%\\r60%\\r', end='', file=sys.stderr)"
    status, lines, output, errors = supervised(tmp_path, code)
    assert status == 0
    assert lines == ["done"]
    assert sorted(output) == [
        *("[0] attempt 0 of 2", "[0] half", "[1] attempt 0 of 2", "[1] half"),
    ]
    assert {"[0] wrong", "[0] 50%", "[0] 60%", "[1] wrong", "[1] 50%", "[1] 60%"} == set(errors)


def test_a_line_without_an_end_is_not_held_for_ever(tmp_path):
    """It is passed on in pieces, each with the number: a million bytes of it are not read again with every new one."""
    _, _, output, _ = supervised(tmp_path, "print('x' * 1_000_000)", processes=1)
    pieces = [line.removeprefix("[0] ") for line in output if line.startswith("[0] x")]
    assert "".join(pieces) == "x" * 1_000_000
    assert all(len(piece) <= 1 << 17 for piece in pieces)


def test_a_killed_process_restarts_all_with_another_port(tmp_path):
    code = """
if attempt == 0:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    sys.exit(75)
"""
    status, lines, _, _ = supervised(tmp_path, code)
    assert status == 0
    assert lines == [
        "process 1 died of SIGKILL, process 0 ended with exit code 75; all are started again in 0.01 s (restart 1 "
        "of 2 without progress)",
        "done (1 restart)",
    ]
    ports = [(tmp_path / f"{number}.{attempt}").read_text() for attempt in (0, 1) for number in (0, 1)]
    assert ports[0] == ports[1]
    assert ports[2] == ports[3]
    assert ports[0] != ports[2]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 130])
def test_what_has_to_be_mended_is_not_started_again(tmp_path, code):
    status, lines, _, _ = supervised(tmp_path, f"sys.exit({code} if number else 75)")
    assert status == code
    (line,) = lines
    assert line.startswith(f"process 1 ended with exit code {code}, process 0 ended with exit code 75; that has to be")
    assert attempts(tmp_path) == 1


def test_it_gives_up_without_progress_only(tmp_path):
    status, lines, _, _ = supervised(tmp_path, "sys.exit(75)", restarts=2)
    assert status == 2
    assert attempts(tmp_path) == 3
    assert (
        lines[-1]
        == "given up after 2 restarts without progress: processes 0 and 1 ended with exit code 75 (2 restarts)"
    )
    assert ["0.01 s" in lines[0], "0.02 s" in lines[1]] == [True, True]


def test_progress_gives_new_restarts(tmp_path):
    """The third attempt continues from a later step; five restarts in all, never more than two without progress."""
    code = "report_start([0, 0, 7, 7, 9, 9][attempt]); sys.exit(75 if attempt < 5 else 0)"
    status, lines, _, _ = supervised(tmp_path, code, processes=1, restarts=2)
    assert status == 0
    assert lines[-1] == "done (5 restarts)"
    assert [line.partition("(restart ")[2][:1] for line in lines[:-1]] == ["1", "2", "1", "2", "1"]


def test_a_stopped_process_and_one_that_hangs_are_killed(tmp_path):
    code = """
if attempt == 0:
    if number == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)
    sys.exit(75)
if attempt == 1:
    if number == 0:
        time.sleep(1000)
    sys.exit(75)
"""
    status, lines, _, _ = supervised(tmp_path, code, grace=1.0)
    assert status == 0
    assert all("process 0 had to be killed" in line for line in lines[:2])
    assert lines[2] == "done (2 restarts)"


LAUNCH = "import sys; from vr_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"


def launched(folder, code, *flags):
    arguments = ["launch", "--processes=2", *flags, "--", sys.executable, "-c", PROGRAM + code, str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with Ctrl-C ignored, which this process would hand on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for number in range(2):
        while not (folder / f"{number}.ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
    return process


WAITING = """
import subprocess
child = subprocess.Popen(["sleep", "1000"])
(folder / f"{number}.pids").write_text(f"{os.getpid()} {child.pid}")
if MODE == "saves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if MODE.isdecimal():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(MODE) if number else 75))
if MODE == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"{number}.ready").touch()
time.sleep(1000)
"""


def running(folder):
    """Which of the processes and their children still run."""
    found = []
    for path in folder.glob("*.pids"):
        for pid in path.read_text().split():
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "ZX":
                found.append(int(pid))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_is_left(tmp_path, number):
    process = launched(tmp_path, f"MODE = 'saves'\n{WAITING}")
    process.send_signal(number)
    started, errors = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == 75
    assert started.startswith("vr-jax launch: started 2 processes (pid ")
    assert errors == (
        f"vr-jax launch: stopped by {number.name} (processes 0 and 1 ended with exit code 75); the same command "
        "continues"
    )
    assert running(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (2, 2, "process 1 ended with exit code 2, process 0 ended with exit code 75; that has to be mended first"),
        (143, 75, "stopped by SIGTERM (process 1 ended with exit code 143, process 0 ended with exit code 75)"),
    ],
)
def test_a_failure_after_a_signal_is_one(tmp_path, code, status, said):
    """A run that was asked to stop and could not save does not continue by the same command."""
    process = launched(tmp_path, f"MODE = '{code}'\n{WAITING}")
    process.terminate()
    assert said in process.communicate(timeout=30)[1]
    assert process.returncode == status


def test_a_second_signal_kills(tmp_path):
    process = launched(tmp_path, f"MODE = 'deaf'\n{WAITING}")
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert "stopped by SIGTERM (processes 0 and 1 had to be killed)" in process.communicate(timeout=30)[1]
    assert process.returncode == 75
    assert running(tmp_path) == []


def test_processes_do_not_outlive_a_killed_supervisor(tmp_path):
    process = launched(tmp_path, f"MODE = ''\n{WAITING}")
    mine = [int(path.read_text().split()[0]) for path in tmp_path.glob("*.pids")]
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while set(mine) & set(running(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    left = running(tmp_path)
    assert not set(mine) & set(left)
    for pid in left:  # what a process itself has started outlives a supervisor that is killed
        os.kill(pid, signal.SIGKILL)


def test_a_step_is_reported_only_to_a_supervisor(tmp_path, monkeypatch):
    report_start(3)
    monkeypatch.setenv("VR_JAX_PROGRESS_FILE", str(tmp_path / "step"))
    report_start(7)
    assert (tmp_path / "step").read_text() == "7"
    monkeypatch.setenv("VR_JAX_PROGRESS_FILE", str(tmp_path / "absent" / "step"))
    report_start(8)
