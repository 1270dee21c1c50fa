"""Runs in processes of their own: killed at any moment, asked to stop, and two processes instead of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.tiny import noise_inputs, tiny_config, tiny_run
from vr_jax.model_directory import load_model
from vr_jax.training import loop
from vr_jax.training.metrics import read_metrics
from vr_jax.training.state import ModelTree

ROOT = Path(__file__).parents[2]
DEADLINE = 900  # seconds; a process that takes longer has hung


def start(workdir, *arguments, devices=8):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    command = [sys.executable, "-m", "tests.training.driver", str(workdir), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Exit code and standard error."""
    try:
        _, errors = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def wait_for(condition, process):
    end = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"the run ended or hung first: {process.communicate()[1]}")
        time.sleep(0.005)


def written(workdir):
    path = workdir / "metrics.jsonl"
    return list(read_metrics(path)) if path.exists() else []


def series(workdir):
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in written(workdir)]


def arrays(workdir):
    return ModelTree(tiny_config()).flatten(load_model(workdir / "model"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, in this process."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(tiny_run(), workdir, open_inputs=noise_inputs())
    return workdir


def saving(workdir, step):
    """Whether step `step` is being written, but not yet committed."""
    folders = list((workdir / "checkpoints").glob(f"{step}*")) if workdir.exists() else []
    return any(folders) and not (workdir / "checkpoints" / str(step) / "commit_success.txt").exists()


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path):
    """kill -9 between two saves, and in the middle of a save; then to the end."""
    moments = {
        "between saves": lambda: len(written(tmp_path)) >= 6,
        "while saving": lambda: saving(tmp_path, 12),
    }
    for moment in moments.values():
        process = start(tmp_path, "--delay=0.05")
        wait_for(moment, process)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        before = len(written(tmp_path))
    process = start(tmp_path)
    code, errors = finish(process)
    assert code == 0, errors
    assert before >= 11
    assert series(tmp_path) == series(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), arrays(whole))


def test_sigterm_saves_and_exits_with_its_code(whole, tmp_path):
    process = start(tmp_path, "--delay=0.05", "--set=checkpoint.every=1000")
    wait_for(lambda: len(written(tmp_path)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 75, errors
    steps = len(written(tmp_path))
    assert 5 <= steps < 20
    assert f"saved step {steps} of 20" in errors
    assert (tmp_path / "checkpoints" / str(steps) / "checksums.process_0.json").exists()
    code, errors = finish(start(tmp_path, "--set=checkpoint.every=1000"))
    assert code == 0, errors
    assert series(tmp_path) == series(whole)


def two_processes(workdir, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = ("--processes=2", f"--coordinator={address}", *arguments)
    return [start(workdir, f"--process={i}", *shared, devices=4) for i in (0, 1)]


@pytest.mark.slow  # two processes train twice: more than a minute. test_distributed.py has two short ones.
def test_two_processes_equal_one(whole, tmp_path):
    """Each with four devices and half of every batch; SIGTERM to either stops both at the same step; they continue."""
    processes = two_processes(tmp_path, "--delay=0.1")
    wait_for(lambda: len(written(tmp_path)) >= 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [75, 75], results
    steps = len(written(tmp_path))
    assert 5 <= steps < 20
    run = json.loads((tmp_path / "checkpoints" / str(steps) / "run" / "metadata").read_text())
    assert run["data"] == [{"number": steps}] * 2

    results = [finish(process) for process in two_processes(tmp_path)]
    assert [code for code, _ in results] == [0, 0], results
    np.testing.assert_allclose(series(tmp_path), series(whole), rtol=1e-5, atol=1e-9)
    for got, expected in zip(jax.tree.leaves(arrays(tmp_path)), jax.tree.leaves(arrays(whole)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)

    # One process alone cannot continue what two began: each had its own place in the data.
    code, errors = finish(start(tmp_path))
    assert code == 2
    assert "was written by 2 processes" in errors
