"""The training iterator: every sample once an epoch, exact resumption, division among processes, worker processes."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.samples import chat, png, small_config
from vr_jax.data.pipeline import make_train_iterator
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipStatistics, TooManySkips
from vr_jax.data.sources import ConcatenatedSource
from vr_jax.data.types import Conversation, HostBatch, Skip
from vr_jax.errors import UserError
from vr_jax.model.batch import BatchShape

SHAPE = BatchShape(rows=2, tokens=160, tiles=9, tile_size=32)
COUNT = 23
BAD = {4: "broken_image", 11: "malformed_record", 12: "image_count"}


class Numbers:
    """Short chats, some of them about one or two images, some of them unusable."""

    def __init__(self, count: int = COUNT, bad: dict[int, str] = BAD, blocks: list[int] | None = None):
        self.count = count
        self.bad = bad
        self.blocks = blocks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation | Skip:
        name = f"n{index}"
        reason = self.bad.get(index)
        if reason == "malformed_record":
            return Skip(name, reason, "made up")
        images = tuple(png(20 + 7 * (index % 5), 20, seed=index + k) for k in range(index % 3))
        if reason == "broken_image":
            images = (b"no image",)
        if reason == "image_count":
            images = (png(), png())
        question = "<image>" * (1 if reason else len(images)) + "\nQ" + "x" * (index % 7)
        return chat(question, f"A{index}", images=images, name=name)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, small_config())


def make(processor, source=None, **options):
    return make_train_iterator(Numbers() if source is None else source, processor, SHAPE, **{"seed": 7} | options)


def drain(iterator) -> tuple[list[HostBatch], list[dict]]:
    """Returns all batches and the state behind each, which passes through JSON as in a checkpoint."""
    found, states = [], []
    for batch in iterator:
        found.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    iterator.close()
    return found, states


def assert_same(found: list[HostBatch], expected: list[HostBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.record_ids == other.record_ids
        assert one.skipped == other.skipped
        for field in dataclasses.fields(one.batch):
            np.testing.assert_array_equal(getattr(one.batch, field.name), getattr(other.batch, field.name))


def names(batches: list[HostBatch]) -> list[str]:
    return [name for batch in batches for row in batch.record_ids for name in row]


@pytest.fixture(scope="module")
def two_epochs(processor):
    return drain(make(processor, num_epochs=2))


def test_every_sample_once_an_epoch_and_every_skip_reported(two_epochs):
    found, _ = two_epochs
    good = [f"n{k}" for k in range(COUNT) if k not in BAD]
    assert sorted(names(found)) == sorted(good * 2)
    skipped = [skip for batch in found for skip in batch.skipped]
    assert sorted((skip.id, skip.reason) for skip in skipped) == sorted(
        (f"n{k}", r) for k, r in BAD.items() for _ in "ab"
    )
    assert all(skip.detail for skip in skipped)
    assert all(batch.batch.tokens.shape == (2, 160) for batch in found)
    assert found[0].batch.segment_ids.max() > 1  # packed


def test_epochs_have_their_own_order_and_seeds_differ(processor):
    def order(**options):
        return names(drain(make(processor, packing=False, num_epochs=2, **options))[0])

    both = order()
    half = len(both) // 2
    assert sorted(both[:half]) == sorted(both[half:])
    assert both[:half] != both[half:]
    assert order() == both
    assert order(seed=8) != both
    good = [f"n{k}" for k in range(COUNT) if k not in BAD]
    assert order(shuffle=False) == good * 2


def test_resume_at_every_batch(processor, two_epochs):
    expected, states = two_epochs
    for k, state in enumerate(states):
        resumed = make(processor, num_epochs=2)
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_same(drain(resumed)[0], expected[k + 1 :])


def test_resume_of_an_iterator_in_use(processor, two_epochs):
    expected, states = two_epochs
    iterator = make(processor, num_epochs=2)
    next(iterator), next(iterator), next(iterator)
    iterator.set_state(states[0])
    assert_same([next(iterator)], expected[1:2])
    iterator.close()


def test_endless_iteration_continues_like_the_finite_one(processor, two_epochs):
    iterator = make(processor)
    expected = two_epochs[0][:2]
    assert_same([next(iterator) for _ in expected], expected)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_processes_share_the_stream(processor):
    parts = [drain(make(processor, num_epochs=2, process_index=k, process_count=3))[0] for k in range(3)]
    good = [f"n{k}" for k in range(COUNT) if k not in BAD]
    assert sorted(name for part in parts for name in names(part)) == sorted(good * 2)
    assert all(names(part) for part in parts)
    with pytest.raises(ValueError, match=r"process_index = 3: expected 0\.\.2"):
        make(processor, process_index=3, process_count=3)


def test_one_sample_per_row(processor):
    found, states = drain(make(processor, packing=False, num_epochs=1))
    rows = [row for batch in found for row in batch.record_ids]
    assert [len(row) for row in rows] == [1] * (COUNT - len(BAD))
    resumed = make(processor, packing=False, num_epochs=1)
    resumed.set_state(states[3])
    assert_same(drain(resumed)[0], found[4:])


def test_partial_last_batch(processor):
    found, _ = drain(make(processor, Numbers(3, {}), packing=False, num_epochs=1))
    assert [[len(row) for row in batch.record_ids] for batch in found] == [[1, 1], [1, 0]]
    assert not found[1].batch.segment_ids[1].any()


def test_skip_first(processor):
    all_names = names(drain(make(processor, packing=False, shuffle=False, num_epochs=1))[0])
    found = names(drain(make(processor, packing=False, shuffle=False, num_epochs=1, skip_first=6))[0])
    assert found == all_names[5:]  # One of the first six samples is unusable.


def test_samples_larger_than_a_row_are_skipped(processor):
    small = BatchShape(rows=1, tokens=40, tiles=2, tile_size=32)
    iterator = make_train_iterator(Numbers(), processor, small, seed=0, num_epochs=1)
    reasons = {skip.reason for batch in drain(iterator)[0] for skip in batch.skipped}
    assert {"too_long", "too_many_tiles"} <= reasons


def test_skips_behind_the_last_usable_sample_are_reported(processor):
    bad = dict.fromkeys([5, 6, 7], "broken_image")
    for packing in (True, False):
        found, _ = drain(make(processor, Numbers(8, bad), shuffle=False, num_epochs=1, packing=packing))
        assert sum(len(batch.skipped) for batch in found) == 3
        assert len(names(found)) == 5


@pytest.mark.parametrize("num_epochs", [1, None])
def test_nothing_usable_at_all(processor, num_epochs):
    iterator = make(processor, Numbers(5, dict.fromkeys(range(5), "broken_image")), num_epochs=num_epochs)
    with pytest.raises(TooManySkips, match=r"None of 5 samples could be used.*\nbroken_image \(5\); .*:\n  n\d: "):
        next(iterator)
    iterator.close()


def test_skip_statistics_of_a_run(processor, two_epochs):
    skip_statistics = SkipStatistics(max_fraction=0.2)
    for batch in two_epochs[0]:
        skip_statistics.update(batch)
    assert (skip_statistics.used, skip_statistics.skipped) == (2 * (COUNT - len(BAD)), 2 * len(BAD))
    skip_statistics.check(final=True)
    skip_statistics.max_fraction = 0.02
    with pytest.raises(TooManySkips, match="6 of 46 samples could not be used"):
        skip_statistics.check(final=True)


class Absent:
    """A hundred thousand records whose images are absent."""

    def __init__(self, usable: int = 0):
        self.usable = usable
        self.read = 0

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Conversation | Skip:
        self.read += 1
        if index % 100 < self.usable:
            return chat("Q", "A", name=f"n{index}")
        return Skip(f"n{index}", "missing_image", "There is no such image.")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_limit_applies_as_skips_come(processor, workers):
    source = Absent()
    iterator = make(processor, source, max_skipped=0.01, num_workers=workers)
    with pytest.raises(
        TooManySkips, match=r"20 of 20 samples could not be used \(100.00%, .*\nmissing_image \(20\); set"
    ):
        next(iterator)
    iterator.close()
    assert source.read < 200, "some records are read ahead"


def test_the_limit_applies_to_the_part_of_each_process(processor):
    iterator = make(processor, Absent(usable=30), max_skipped=0.1, process_index=1, process_count=3)
    with pytest.raises(TooManySkips, match=r"(2\d|3\d|4\d) of \d\d samples could not be used"):
        next(iterator)
    iterator.close()


def test_the_share_of_a_whole_epoch_is_compared_exactly(processor):
    """3 of 23 are unusable: too few to be sure of while they come, but known after the epoch."""
    iterator = make(processor, num_epochs=2, max_skipped=2.9 / 23)
    with pytest.raises(TooManySkips, match="3 of 23 samples could not be used"):
        drain(iterator)
    iterator.close()
    found, _ = drain(make(processor, num_epochs=2, max_skipped=3 / 23))
    assert sum(len(batch.skipped) for batch in found) == 6


def test_the_count_of_skips_continues_after_a_resumption(processor):
    """Resumed at any batch, the iterator stops at the same sample as without an interruption."""
    source = Numbers(400, dict.fromkeys(range(0, 400, 7), "malformed_record"))
    options = {"max_skipped": 0.08, "packing": False, "lookahead": 1}

    def stops_at(state=None):
        iterator = make(processor, source, **options)
        if state is not None:
            iterator.set_state(state)
        states = []

        def drive():
            for _ in iterator:
                states.append(json.loads(json.dumps(iterator.get_state())))  # noqa: PERF401 - kept after an error

        with pytest.raises(TooManySkips) as caught:
            drive()
        iterator.close()
        return str(caught.value).split("(")[0], states

    message, states = stops_at()
    assert " of " in message
    for state in states[1 :: max(1, len(states) // 2)]:
        assert stops_at(state)[0] == message


def test_a_long_preparation_is_told(processor, caplog, monkeypatch):
    monkeypatch.setattr("vr_jax.data.pipeline.TELL_SECONDS", 0.0)
    next_batch = make(processor, Numbers(8, dict.fromkeys([5, 6, 7], "broken_image")), shuffle=False, num_epochs=1)
    drain(next_batch)
    assert "Still preparing a batch: 5 samples used and 3 skipped so far; broken_image 3" in caplog.text


def test_state_of_another_pipeline_is_refused(processor, two_epochs):
    state = two_epochs[1][0]
    with pytest.raises(UserError, match="seed: saved 7, now 8"):
        make(processor, seed=8).set_state(state)
    with pytest.raises(UserError, match="samples: saved 23, now 24"):
        make(processor, Numbers(24)).set_state(state)
    with pytest.raises(UserError, match="version 99"):
        make(processor).set_state(state | {"version": 99})
    with pytest.raises(UserError, match="has no samples"):
        make(processor, Numbers(0))


def test_a_source_with_blocks_is_shuffled_by_blocks(processor):
    source = Numbers(60, {}, blocks=list(range(0, 60, 10)))
    found = [int(name[1:]) for name in names(drain(make(processor, source, packing=False, num_epochs=1))[0])]
    assert sorted(found) == list(range(60))
    assert len({number // 10 for number in found[:40]}) == 4


def test_several_sources_are_mixed_and_resume_exactly(processor):
    def joined(*counts):
        return ConcatenatedSource([Numbers(count, {}, blocks) for count, blocks in counts])

    parts = (20, [0, 7, 14]), (9, None), (11, [0, 6])
    expected, states = drain(make(processor, joined(*parts), num_epochs=2))
    assert len(names(expected)) == 80
    for k in (0, len(states) // 2):
        resumed = make(processor, joined(*parts), num_epochs=2)
        resumed.set_state(states[k])
        assert_same(drain(resumed)[0], expected[k + 1 :])
    other = make(processor, joined(*reversed(parts)), num_epochs=2)
    with pytest.raises(UserError, match=r"samples: saved \[20, 9, 11\], now \[11, 9, 20\]"):
        other.set_state(states[0])
    other.close()


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")} if os.path.isdir("/dev/shm") else set()


def test_worker_processes_change_nothing_and_leave_nothing(tokenizer):
    """Two workers give the same batches as none, also after a resumption.

    The images are large enough to pass through shared memory.
    """
    config = small_config()
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, image_size=192),
        projector=dataclasses.replace(config.projector, stride=12),
        image=dataclasses.replace(config.image, tile_size=192),
    )
    processor = Processor(tokenizer, config)
    shape = dataclasses.replace(SHAPE, tile_size=192)
    before, memory = workers(), shared_memory()
    expected, states = drain(make_train_iterator(Numbers(), processor, shape, seed=7, num_epochs=2))
    iterator = make_train_iterator(Numbers(), processor, shape, seed=7, num_epochs=2, num_workers=2)
    found, worker_states = drain(iterator)
    assert_same(found, expected)
    assert worker_states == states, "a run may continue with another number of workers"
    resumed = make_train_iterator(Numbers(), processor, shape, seed=7, num_epochs=2, num_workers=2)
    resumed.set_state(worker_states[1])
    assert_same([next(resumed), next(resumed)], expected[2:4])
    resumed.close()  # The workers are in the middle of their work.
    assert workers() == before
    assert shared_memory() <= memory


ORPHANS = """
import sys
from tests.data.test_pipeline import Numbers, make
from tests.data.samples import small_config
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from multiprocessing import active_children
if __name__ == "__main__":
    iterator = make(Processor(demo_tokenizer(), small_config()), num_workers=1)
    next(iterator)
    print(*(child.pid for child in active_children()), flush=True)
    sys.stdin.read()
"""


UNCLOSED = """
from tests.data.test_pipeline import Numbers, make
from tests.data.samples import small_config
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
iterator = make(Processor(demo_tokenizer(), small_config()))
print(next(iterator).record_ids)
"""


@pytest.mark.slow  # It starts two programs.
def test_a_program_may_end_without_closing():
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0
    assert "n" in run.stdout
    assert "Traceback" not in run.stderr


def test_workers_die_with_a_killed_run(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL  # Python's resource tracker reports leaks of the killed run.
    run = subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=environment
    )
    (worker,) = map(int, run.stdout.readline().split())
    # A signal to the whole process group does not end the worker before the run.
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, 0)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while _alive(worker):
        assert time.monotonic() < deadline, f"worker {worker} outlived its run"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
