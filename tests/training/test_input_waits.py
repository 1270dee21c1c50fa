"""The process that waits longest for its data is named with its source, where that matters."""

from __future__ import annotations

import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from tests.training.test_processes import finish, start
from tests.training.tiny import noise_inputs, plain_run
from vr_jax import distributed
from vr_jax.training import loop
from vr_jax.training.input_waits import InputWaits
from vr_jax.training.trackers import read_metrics

pytestmark = pytest.mark.usefixtures("shared_programs")


def batch(*sources):
    return SimpleNamespace(batch=SimpleNamespace(token_source=np.asarray(sources) if sources else None))


def waits(time, sources=()):
    return InputWaits(plain_run(**{"data.path": "gs://bucket/slow"}), sources, clock=lambda: time[0])


def test_of_several_processes_the_slowest_is_named_with_its_source(monkeypatch, caplog):
    time = [0.0]
    one = waits(time, ("charts", "photos"))
    one.add(2.0, batch(1, 1, 1, 0, -1, -1))
    time[0] = 40.0
    others = [{"waited": 0.5, "source": "charts", "part": 0.5, "name": "process 0 of 3 on a"}]
    monkeypatch.setattr(distributed, "this_process", lambda: "process 1 of 3 on b")
    monkeypatch.setattr(distributed, "gather", lambda own: [*others, own, *others])
    assert one.exchange(100) == {"data_wait_max": 0.05, "data_wait_process": 1.0}
    assert caplog.messages == [
        "process 1 of 3 on b waited 2.0 of 40.0 s for its data until step 100, 1.5 s of them for photos; "
        "no other process waited longer than 0.5 s"
    ]


def test_below_the_threshold_nothing_is_said_and_each_exchange_begins_anew(caplog):
    time = [0.0]
    one = waits(time)
    one.add(1.9, batch())
    time[0] = 40.0
    assert one.exchange(100) == {}
    one.add(1.9, batch())
    time[0] = 80.0
    one.exchange(200)
    assert not caplog.messages
    one.add(10.0, batch())
    time[0] = 90.0
    one.exchange(300)
    assert "waited 10.0 of 10.0 s for its data until step 300, 10.0 s of them for gs://bucket/slow" in caplog.text


def test_a_run_names_its_slow_data(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 3)
    loop.train(plain_run(**{"checkpoint.every": 4}), tmp_path, open_inputs=noise_inputs(delay=0.2))
    told = [line for line in caplog.messages if "for its data until step" in line]
    # Step 3 is a comparison, and step 4 the checkpoint at the end; the first seconds went into the compilation.
    assert told[-1].split("until step ")[1].startswith("4,")


@pytest.mark.slow  # Two processes train: half a minute.
def test_of_two_processes_the_one_with_slow_data_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = (f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2", "--set=steps=6")
    runs = [start(tmp_path, f"--process={i}", f"--delay={i}", *shared, devices=4) for i in range(2)]
    results = [finish(one) for one in runs]
    assert [code for code, _ in results] == [0, 0], results
    assert re.search(r"process 1 of 2 on \S+ waited \d+\.\d of \d+\.\d s for its data until step 6", results[0][1])
    last = list(read_metrics(tmp_path / "metrics.jsonl"))[-1]
    assert (last["step"], last["data_wait_process"]) == (6, 1)
    assert 0.05 < last["data_wait_max"] <= 1
