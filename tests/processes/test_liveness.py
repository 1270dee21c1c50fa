"""Processes that know of each other without JAX: they start, die, stand still and come back."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vr_jax.errors import EXIT_AGAIN, ProcessLost, UserError
from vr_jax.processes.liveness import Liveness

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()

WORKER = """
import logging, sys, time
from vr_jax.errors import UserError
from vr_jax.processes.liveness import Ending, Liveness
from vr_jax.processes.watch import Watch

logging.basicConfig(format="%(message)s")
address, count, number, timeout, start, then, folder = sys.argv[1:]
timeout = float(timeout)
liveness = Liveness(address, int(count), int(number), timeout=timeout)
try:
    liveness.join(float(start))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
watch = Watch(liveness, timeout)
watch.releases.append(lambda: open(f"{folder}/released_{number}", "w").close())
print("up", flush=True)
if then == "fail":
    ending = watch.tell(Ending("/nowhere.json: no such file", 2), lost=False)
    print(ending.message, file=sys.stderr)
    watch.leave(ending.code)
if then == "done":
    sys.exit(0)
while True:  # what a run writes
    time.sleep(0.01)
    with open(f"{folder}/{number}", "a") as file:
        file.write("x")
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(address, count, number, folder, *, timeout=1.5, wait=20.0, then="write") -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, address, *map(str, (count, number, timeout, wait, then, folder))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes)


def start_all(count, folder, **options) -> list[subprocess.Popen]:
    address = free_address()
    processes = [start(address, count, number, folder, **options) for number in range(count)]
    for process in processes:
        assert process.stdout.readline() == "up\n", process.communicate()[1]
    return processes


def ends(processes) -> list[tuple[int, str]]:
    """Exit code and standard error of each process."""
    found = [process.communicate(timeout=30)[1] for process in processes]
    return [(process.returncode, errors) for process, errors in zip(processes, found, strict=True)]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_by_all_others_in_one_line(tmp_path, victim):
    processes = start_all(3, tmp_path, timeout=20.0)  # what tells is the connection, long before the timeout
    processes[victim].kill()
    begin = time.monotonic()
    others = [process for number, process in enumerate(processes) if number != victim]
    for code, errors in ends(others):
        assert code == EXIT_AGAIN
        (line,) = errors.splitlines()
        assert line.startswith(f"process {victim} of 3 on {HOST} is lost: it has ended without a word (killed, out of")
        assert line.endswith("start all processes again with the same command")
    assert time.monotonic() - begin < 15
    processes[victim].communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_lost_and_writes_nothing_when_it_continues(tmp_path, victim):
    processes = start_all(2, tmp_path)
    file = tmp_path / str(victim)
    while not file.exists():
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGSTOP)
    ((code, errors),) = ends([processes[1 - victim]])
    assert code == EXIT_AGAIN
    (line,) = errors.splitlines()
    assert line.startswith(f"process {victim} of 2 on {HOST} is lost: it gave no sign of life for 1.5 s")
    written = file.stat().st_size
    processes[victim].send_signal(signal.SIGCONT)
    ((code, errors),) = ends([processes[victim]])
    assert code == EXIT_AGAIN
    (line,) = errors.splitlines()
    assert re.match(
        rf"process {victim} of 2 on {HOST} stood still for \d+ s, and after 1.5 s the others count it", line
    )
    assert file.stat().st_size - written <= 1  # one that had begun


def test_a_short_stop_is_no_loss(tmp_path):
    processes = start_all(2, tmp_path, timeout=3.0)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    processes[1].send_signal(signal.SIGCONT)
    time.sleep(3)
    assert [process.poll() for process in processes] == [None, None]
    for process in processes:
        process.kill()
        process.communicate()


def test_a_failure_ends_all_with_its_code_and_the_first_line(tmp_path):
    address = free_address()
    processes = [start(address, 3, number, tmp_path, then="fail" if number == 1 else "write") for number in range(3)]
    for code, errors in ends(processes):
        assert code == 2
        assert errors.splitlines() == [f"process 1 of 3 on {HOST}: /nowhere.json: no such file"]
    assert len(list(tmp_path.glob("released_*"))) == 3  # what each held is given back


def test_a_process_that_is_done_is_not_lost(tmp_path):
    address = free_address()
    processes = [start(address, 2, number, tmp_path, then="done" if number else "write") for number in range(2)]
    assert ends(processes[1:]) == [(0, "")]
    time.sleep(2.5)
    assert processes[0].poll() is None
    processes[0].kill()
    processes[0].communicate()


@pytest.mark.parametrize("missing", [0, 2])
def test_a_process_that_never_starts_is_named_by_those_that_wait(tmp_path, missing):
    address = free_address()
    numbers = [number for number in range(3) if number != missing]
    for code, errors in ends([start(address, 3, number, tmp_path, wait=2.0) for number in numbers]):
        assert code == EXIT_AGAIN
        (line,) = errors.splitlines()
        assert line.startswith(f"process {missing} of 3 has not started within ")
        assert f"(coordinator {address}: all must be started with this address of process 0)" in line


def test_one_that_dies_before_all_have_started_may_come_again(tmp_path):
    address = free_address()
    first, early = (start(address, 3, number, tmp_path) for number in (0, 1))
    time.sleep(1)
    early.kill()
    early.communicate()
    rest = [start(address, 3, number, tmp_path) for number in (1, 2)]
    for process in (first, *rest):
        assert process.stdout.readline() == "up\n"
        process.kill()
    for process in (first, *rest):
        process.communicate()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            [(2, 0), (3, 1)],
            f"process 1 of 3 on {HOST}: its number of processes is 3 there and 2 on process 0; start all",
        ),
        ([(3, 0), (3, 1), (3, 1)], f"two processes have the number 1, on {HOST} and {HOST}; start all"),
    ],
)
def test_numbers_that_contradict_each_other_end_all(tmp_path, numbers, message):
    address = free_address()
    for code, errors in ends([start(address, count, number, tmp_path) for count, number in numbers]):
        assert code == 2
        assert errors.startswith(message)


def test_strangers_at_the_port_are_ignored(tmp_path):
    """A port scanner or the probe of a cluster says something else, or nothing."""
    address = free_address()
    first = start(address, 2, 0, tmp_path)
    host, _, port = address.partition(":")
    calls = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": "one"}\n', b""):
        for _ in range(200):
            try:
                call = socket.create_connection((host, int(port)))
                break
            except OSError:
                time.sleep(0.05)
        call.sendall(words)
        calls.append(call)
    second = start(address, 2, 1, tmp_path)
    assert [process.stdout.readline() for process in (first, second)] == ["up\n", "up\n"]
    for process in (first, second):
        process.kill()
    for process in (first, second):
        process.communicate()
    for call in calls:
        call.close()


def test_a_port_in_use_is_one_line(monkeypatch):
    monkeypatch.setattr("vr_jax.processes.liveness._PORT_WAIT", 0.0)
    with socket.create_server(("", 0)) as held:
        address = f"localhost:{held.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"process 0 cannot listen at the coordinator's address {address}: Address"
        ):
            Liveness(address, 2, 0).join()


def test_a_waiting_process_says_for_whom(monkeypatch, caplog):
    monkeypatch.setattr("vr_jax.processes.liveness._SAY_WAITING", 0.0)
    for number, missing in ((0, "process 1 of 2"), (1, "process 0 of 2")):
        with pytest.raises(ProcessLost, match=f"{missing} has not started within"):
            Liveness(free_address(), 2, number).join(0.6)
        assert f"for {missing} (coordinator localhost:" in caplog.text
