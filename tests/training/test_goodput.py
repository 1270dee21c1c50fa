"""What the time of a run is spent on: by a clock that the test turns, over starts that are killed, in a real run."""

from __future__ import annotations

import json

import pytest

from tests.training.tiny import noise_inputs, plain_run
from vr_jax.training import loop
from vr_jax.training.goodput import GOODPUT_FILE, KINDS, Goodput
from vr_jax.training.stopping import Preempted

pytestmark = pytest.mark.usefixtures("shared_programs")


class Time:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.value = 1000.0

    def __call__(self):
        return self.value


@pytest.fixture
def time():
    return Time()


def opened(workdir, time):
    return Goodput(workdir, clock=time, now=lambda: 5000.0 + time.value)


def content(workdir):
    return json.loads((workdir / GOODPUT_FILE).read_text())


def spent(workdir):
    return {kind: seconds for kind, seconds in content(workdir)["seconds"].items() if seconds}


def four_steps(goodput, time, first=1, until=4):
    """A second of start, two of compiling, then steps of ten seconds of which one waits; saved after two."""
    time.value += 1
    goodput.continues(first - 1)
    goodput.stepping()
    with goodput.spend("compiling"):
        time.value += 2
    for step in range(first, until + 1):
        with goodput.spend("data"):
            time.value += 1
        time.value += 9
        goodput.stepped(step)
        if step == 2:
            goodput.saved(step)
            with goodput.spend("saving"):
                time.value += 3


def test_each_second_belongs_to_one_kind(tmp_path, time, caplog):
    caplog.set_level("INFO")
    with opened(tmp_path, time) as goodput:
        four_steps(goodput, time)
    assert spent(tmp_path) == {"starting": 1, "compiling": 2, "data": 4, "steps": 36, "saving": 3}
    assert sum(spent(tmp_path).values()) == time.value - 1000
    assert "time of the run: 46.0 s, 78.3% in steps, 8.7% waiting for data, 4.3% compiling, 6.5% saving" in caplog.text


def test_a_killed_start_loses_what_was_behind_its_checkpoint_and_the_time_until_the_next(tmp_path, time):
    """The file was written last after step 4, 43 + 3 seconds after the start; step 2 is what is left, after 23."""
    killed = opened(tmp_path, time)
    four_steps(killed, time)
    killed._turn("steps")  # noqa: SLF001  # as the write that comes now and then
    killed._write()  # noqa: SLF001
    time.value += 100
    with opened(tmp_path, time) as goodput:
        four_steps(goodput, time, first=3)
        assert "over 2 starts" in goodput.line()
        assert "steps computed twice: 2" in goodput.line()
    assert spent(tmp_path)["lost"] == (46 - 23) + 100
    assert spent(tmp_path)["steps"] == 18 + 18
    assert sum(spent(tmp_path).values()) == time.value - 1000


def test_a_start_without_a_checkpoint_is_lost_as_a_whole(tmp_path, time):
    killed = opened(tmp_path, time)
    four_steps(killed, time)
    killed._write()  # noqa: SLF001
    with opened(tmp_path, time) as goodput:
        goodput.continues(0)
    assert spent(tmp_path).keys() == {"lost"}


def test_a_start_that_was_asked_to_stop_loses_nothing(tmp_path, time):
    goodput = opened(tmp_path, time)
    four_steps(goodput, time)
    goodput.saved(4)
    goodput.__exit__(Preempted, Preempted("asked"), None)
    time.value += 1000
    with opened(tmp_path, time) as goodput:
        goodput.continues(4)
    assert "lost" not in spent(tmp_path)
    assert content(tmp_path)["redone"] == 0


def test_a_start_that_fails_before_it_continues_leaves_the_file_alone(tmp_path, time):
    with opened(tmp_path, time) as goodput:
        four_steps(goodput, time)
    before = content(tmp_path)
    opened(tmp_path, time).__exit__(RuntimeError, RuntimeError(), None)
    assert content(tmp_path) == before


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": "other"}', b"\xff\xfe", b"[" * 100_000])
def test_a_file_of_no_use_is_told_and_replaced(tmp_path, time, caplog, data):
    (tmp_path / GOODPUT_FILE).write_bytes(data)
    with opened(tmp_path, time) as goodput:
        four_steps(goodput, time)
    assert "goodput.json is not readable" in caplog.text
    assert content(tmp_path)["starts"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("version", 2), ("starts", "many"), ("redone", None), ("step", "4"), ("written", float("nan"))),
        *(("saves", []), ("saves", {"2": {}}), ("saves", {"two": dict.fromkeys(KINDS, 0)}), ("ended", None)),
        *(("seconds", dict.fromkeys(KINDS, "long")), ("seconds", {"steps": 1.0})),
    ],
)
def test_a_file_with_a_damaged_field_is_told_and_replaced(tmp_path, time, caplog, name, value):
    with opened(tmp_path, time) as goodput:
        four_steps(goodput, time)
    (tmp_path / GOODPUT_FILE).write_text(json.dumps({**content(tmp_path), name: value}))
    with opened(tmp_path, time) as goodput:
        time.value += 1
        goodput.continues(2)
    assert "goodput.json is not readable" in caplog.text
    assert content(tmp_path)["starts"] == 1


def test_only_the_first_process_keeps_the_file(tmp_path):
    with Goodput(tmp_path, active=False) as goodput:
        goodput.continues(0)
        goodput.saved(1)
    assert not (tmp_path / GOODPUT_FILE).exists()


def test_a_run_tells_its_time_and_carries_it_over_a_restart(tmp_path, caplog):
    """Killed in the process, after step 3 of 4 with a checkpoint at 2."""

    class Killed(BaseException):
        """Not an Exception, so nothing may handle it."""

    def failing(config, mesh, workdir):
        inputs = noise_inputs()(config, mesh, workdir)
        following = inputs.iterator.__class__.__next__

        class Iterator(inputs.iterator.__class__):
            def __next__(self):
                if self.number == 3:
                    raise Killed
                return following(self)

        inputs.iterator.__class__ = Iterator
        return inputs

    caplog.set_level("INFO")
    with pytest.raises(Killed):
        loop.train(plain_run(), tmp_path, open_inputs=failing)
    assert not content(tmp_path)["ended"]
    loop.train(plain_run(), tmp_path, open_inputs=noise_inputs())
    found = content(tmp_path)
    assert (found["starts"], found["redone"], found["ended"], found["step"]) == (2, 1, True, 4)
    assert set(found["seconds"]) == set(KINDS)
    assert {"steps", "data", "compiling", "saving", "restoring", "starting", "lost"} <= set(spent(tmp_path))
    assert any("over 2 starts" in line and "steps computed twice: 1" in line for line in caplog.messages)
