"""Runs in processes of their own: killed at any moment, asked to stop, and two processes instead of one."""

import json
import os
import shutil
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

    # One process alone continues what two began, from exactly their parameters.
    by_two = arrays(tmp_path)
    shutil.rmtree(tmp_path / "model")
    code, errors = finish(start(tmp_path))
    assert code == 0, errors
    assert "finished: step 20 is the last of the run" in errors
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), by_two)


ADDED = 120  # samples of each of two sources, of which the whole run reads less than an epoch


def text_files(folder):
    """Two data files of texts, named by the letter of their source and a number."""
    for letter in "ab":
        records = [
            {
                "id": f"{letter}{k}",
                "conversations": [{"from": "human", "value": "Q" + "x" * (7 * k % 30)}, {"from": "gpt", "value": "A"}],
            }
            for k in range(ADDED)
        ]
        (folder / f"{letter}.json").write_text(json.dumps(records))


def processes_read(workdir, count, steps):
    """Continues the run of the texts on some processes, of one device each; what they read at each step, by process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = (f"--set=mesh.replica={count}", "--set=mesh.fsdp=1", f"--set=steps={steps}", f"--texts={workdir}")
    if count > 1:
        shared = (*shared, f"--processes={count}", f"--coordinator={address}")
    processes = [start(workdir / "run", f"--process={k}", *shared, devices=1) for k in range(count)]
    for code, errors in map(finish, processes):
        assert code == 0, errors
    return [json.loads((workdir / f"read_{count}_{k}.json").read_text()) for k in range(count)]


@pytest.mark.slow  # Six processes train: more than a minute. tests/data/test_elastic.py shows it within one process.
def test_a_run_continues_on_other_numbers_of_processes_with_every_sample_once(tmp_path):
    """2, then 3, then 1: no sample comes twice, none is left out, and counts and losses of each source are exact."""
    text_files(tmp_path)
    read = []  # of each step, the names of the samples of all processes
    for count, steps in ((2, 3), (3, 6), (1, 8)):
        by_process = processes_read(tmp_path, count, steps)
        read += [[name for one in by_process for name in one[k]] for k in range(len(by_process[0]))]
    assert len(read) == 8
    records = written(tmp_path / "run")
    for record, names in zip(records, read, strict=True):
        for letter in "ab":
            assert record[f"samples/{letter}"] == sum(name[0] == letter for name in names)
        assert record["targets/a"] + record["targets/b"] == record["targets"]
        parts = sum(record[f"loss/{letter}"] * record[f"targets/{letter}"] for letter in "ab")
        assert parts / record["targets"] == pytest.approx(record["loss"], rel=1e-5)
    names = [name for step in read for name in step]
    assert len(names) > 60
    assert len(set(names)) == len(names)
    # Unshuffled, the sources alternate. What was not read in front of the last sample waits in the packer or is dealt.
    run = json.loads((tmp_path / "run" / "checkpoints" / "8" / "run" / "metadata").read_text())
    (state,) = run["data"]
    waiting = [f"{'ab'[stream]}{index}" for stream, index in [*state["pending"], *state["left"][state["next"] :]]]
    assert sorted(names + waiting) == sorted(
        f"{letter}{k}" for letter in "ab" for k in range(len(names + waiting) // 2)
    )
    assert run["skip_statistics"]["used"] == len(names)


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
