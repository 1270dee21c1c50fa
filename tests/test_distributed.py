"""What several processes exchange and agree on, tried with one process and with two real ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vr_jax import distributed
from vr_jax.errors import UserError, user_error_class

ROOT = Path(__file__).parents[1]

WORKER = """
import json, os, sys
os.environ["HOSTNAME"] = "here"
import socket
socket.gethostname = lambda: "here"
from vr_jax import distributed
from vr_jax.errors import UserError
from vr_jax.storage import complete_directory, directory_lock, is_complete

class SpecialError(UserError):
    exit_code = 77

coordinator, number, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributed.initialize(coordinator, 2, number)
found = {"count": distributed.process_count(), "index": distributed.process_index(), "first": distributed.is_first()}
found["gathered"] = distributed.gather({"from": "é" * number, "n": [number]})
distributed.barrier("a name")
found["together"] = distributed.together(lambda: number)

def failing(error, *processes):
    def call():
        if number in processes:
            raise error
    try:
        distributed.together(call)
    except BaseException as caught:
        return [type(caught).__name__, str(caught), getattr(caught, "exit_code", None)]
    return None

found["user"] = failing(UserError("no such file"), 1)
found["special"] = failing(SpecialError("stopped"), 0)
found["system"] = failing(OSError(28, "No space left on device"), 1)
found["both"] = failing(UserError(f"of {number}"), 0, 1)
found["bug"] = failing(KeyError("a bug"), 1)

def differing(values):
    try:
        distributed.check_same(values)
    except UserError as error:
        return str(error)

found["same"] = differing({"config": {"steps": 2, "lr": 0.5, "levels": (1, 2)}, "workdir": "/a"})
found["differing"] = differing({"config": {"steps": 2 + number, "lr": 0.5}})

def attempt(call):
    try:
        call()
    except UserError as error:
        return str(error)

def write(fails=False):
    with complete_directory(f"{folder}/model", overwrite=True) as inside:
        (inside / f"{number}").write_text(str(fails))
        if fails:
            distributed.together(lambda: (inside / "absent" / "x").write_text("") if number == 1 else None)

def hold():
    with directory_lock(f"{folder}/run") as lease:
        found["lease"] = lease is not None
        found["locked"] = os.path.exists(f"{folder}/run/.lock")

found["write"] = attempt(write)
found["write_fails"] = attempt(lambda: write(fails=True))
found["hold"] = attempt(hold)
found["hold_held"] = attempt(lambda: directory_lock(f"{folder}/other").__enter__())
distributed.barrier("end")
found["files"] = sorted(os.listdir(f"{folder}/model"))
found["left"] = sorted(os.listdir(folder)), os.listdir(f"{folder}/run")
with open(f"{folder}.{number}.json", "w") as file:
    json.dump(found, file)
"""


def start_two(code: str, *arguments: str) -> list[subprocess.Popen]:
    """Starts two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(number), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found; they run once for all tests."""
    folder = tmp_path_factory.mktemp("two") / "shared"
    (folder / "other").mkdir(parents=True)
    (folder / "other" / ".lock").touch()  # of an unknown run, and fresh
    workers = start_two(WORKER, str(folder))
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [json.loads(folder.with_name(f"shared.{number}.json").read_text()) for number in range(2)]


def test_processes_know_their_number_and_exchange_values(found):
    for number, one in enumerate(found):
        assert (one["count"], one["index"], one["first"]) == (2, number, number == 0)
        assert one["gathered"] == [{"from": "", "n": [0]}, {"from": "é", "n": [1]}]
        assert one["together"] == number


def test_a_foreseen_error_of_one_process_is_the_same_error_of_all(found):
    for one in found:
        assert one["user"] == ["UserError", "process 1 of 2 on here: no such file", 2]
        assert one["special"] == ["SpecialError", "process 0 of 2 on here: stopped", 77]
        advice = "No space left on device; free some space, or choose another folder"
        assert one["system"] == ["UserError", f"process 1 of 2 on here: {advice}", 2]
        assert one["both"] == ["UserError", "process 0 of 2 on here: of 0", 2]


def test_an_unforeseen_error_of_one_process_stops_the_others(found):
    message = "process 1 of 2 on here failed (KeyError: 'a bug'); its own log says why"
    assert found[0]["bug"] == ["ProcessFailed", message, 1]
    assert found[1]["bug"] == ["KeyError", "'a bug'", None]


def test_values_that_differ_between_processes_are_named(found):
    for one in found:
        assert one["same"] is None
        assert one["differing"].startswith("process 1 of 2 on here: config.steps is 3 there and 2 on process 0; start")


ALONE = """
import os, sys, time
import signal
import jax
from vr_jax import distributed
from vr_jax.cli.main import guarded
from vr_jax.errors import UserError

coordinator, number, failing, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def work():
    distributed.initialize(coordinator, 2, number)
    distributed.barrier("start")
    print("started", flush=True)
    if number == failing:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("/nowhere.json: no such file")
    distributed.barrier("never reached by the other")

sys.exit(guarded(["vr-jax", "train"], work))
"""


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])  # 5 seconds each
def test_an_error_that_one_process_has_alone_ends_all_within_seconds(failing):
    """The other one waits in a collective call, and yet says in its first line who failed and why."""
    workers = start_two(ALONE, str(failing), "fails")
    for worker in workers:
        while worker.stdout.readline().strip() not in ("started", ""):  # Gloo writes a line before
            pass
    begin = time.monotonic()
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert time.monotonic() - begin < 10
    for worker, error in zip(workers, errors, strict=True):
        assert worker.returncode == 2
        assert "Traceback" not in error
        assert f"process {failing} of 2 on {socket.gethostname()}: /nowhere.json: no such file" in error
    assert errors[failing].splitlines()[-1].startswith(f"vr-jax train: process {failing} of 2 on ")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])  # 5 seconds each
def test_a_killed_process_is_named_by_the_other_in_one_line_without_a_stack_trace(lost):
    """Process 0 holds the coordination service of JAX, at whose loss JAX itself aborts the others."""
    workers = start_two(ALONE, str(lost), "killed")
    begin = time.monotonic()
    errors = [worker.communicate(timeout=60)[1] for worker in workers]
    assert time.monotonic() - begin < 60
    assert workers[lost].returncode == -9
    assert workers[1 - lost].returncode == 75, errors
    (line,) = errors[1 - lost].splitlines()
    assert f"process {lost} of 2 on {socket.gethostname()} is lost: it has ended without a word" in line


def test_folders_are_written_and_held_by_all_processes_together(found):
    for number, one in enumerate(found):
        assert one["write"] is None
        assert one["files"] == ["0", "1", "_COMPLETE"]
        assert "process 1 of 2 on here" in one["write_fails"]
        assert "absent" in one["write_fails"]
        assert one["hold"] is None
        assert one["lease"] == (number == 0)
        assert one["locked"]
        assert "other is in use by another run" in one["hold_held"]
        assert one["left"] == [["model", "other", "run"], []]


def test_one_process_needs_no_others():
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.is_first()
    distributed.barrier("alone")
    assert distributed.together(lambda: 3) == 3
    distributed.initialize()


def test_errors_of_one_process_stay_as_they_are():
    def fail(error):
        raise error

    class OwnError(UserError):
        exit_code = 9

    original = OwnError("mine")
    with pytest.raises(OwnError) as error:
        distributed.together(lambda: fail(original))
    assert error.value is original
    with pytest.raises(UserError, match="disk full"):
        distributed.together(lambda: fail(OSError("disk full")))
    with pytest.raises(KeyError, match="a bug"):
        distributed.together(lambda: fail(KeyError("a bug")))
    assert user_error_class(OwnError.__qualname__) is OwnError
    assert user_error_class("never heard of") is UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "no --process_id: give --coordinator, --num_processes and --process_id together"),
        ((None, 2, 0), "there is no --coordinator"),
        (("localhost:1", 2, 2), r"process_id = 2: expected 0\.\.1 for 2 processes"),
        (("localhost", 2, 0), "--coordinator = localhost: expected HOST:PORT with a port from 1 to 65535"),
        (("localhost:99999", 2, 0), "expected HOST:PORT"),
        ((":80", 2, 0), "expected HOST:PORT"),
        (("no-such-host.invalid:80", 2, 1), r"does not know the name no-such-host\.invalid \(.+\); give the name or"),
    ],
)
def test_incomplete_addresses_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]:http", "[::]:0"])
def test_an_address_to_listen_at_that_has_no_port_is_refused(monkeypatch, address):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", address)
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_BIND_ADDRESS = .+: expected HOST:PORT"):
        distributed.initialize("localhost:1", 2, 0)
