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
from vr_jax.training.state import ModelTree
from vr_jax.training.trackers import read_metrics

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


@pytest.mark.slow  # Three processes train. test_loop.py does so within one process, bit for bit.
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


@pytest.mark.slow  # Two processes train. test_loop.py tests the signal within one process.
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


def data_file(folder):
    record = {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps([record] * 8))


@pytest.mark.slow  # two processes start JAX and build the demo's model: about 15 seconds
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_file_that_one_of_two_processes_lacks_ends_both_within_seconds(tmp_path, lacking):
    """The processes have the same settings, and the relative path of the data leads somewhere in one of them only."""
    places = [tmp_path / "0", tmp_path / "1"]
    data_file(places[1 - lacking])
    places[lacking].mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    command = [
        *(sys.executable, "-m", "vr_jax", "train", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"),
        *("--config.data.path=data.json", "--config.data.format=llava_json", "--config.steps=1"),
        *("--num_processes=2", f"--coordinator={address}"),
    ]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={number}"], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
        )
        for number, place in enumerate(places)
    ]
    ends = []
    for process in processes:
        code, errors = finish(process)
        ends.append(time.monotonic())
        assert code == 2, errors
        line = next(line for line in errors.splitlines() if "data.json" in line)
        assert f"process {lacking} of 2 on {socket.gethostname()}: " in line
        assert "Traceback" not in errors
    assert ends[1] - ends[0] < 10
    assert not any((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow  # two processes start JAX: about 10 seconds
def test_settings_that_differ_between_two_processes_are_named(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = ("--processes=2", f"--coordinator=localhost:{free.getsockname()[1]}")
    processes = [
        start(tmp_path, f"--process={number}", *shared, f"--set=steps={number + 3}", devices=4) for number in (0, 1)
    ]
    for code, errors in map(finish, processes):
        assert code == 2, errors
        assert f"process 1 of 2 on {socket.gethostname()}: config.steps is 4 there and 3 on process 0" in errors
