"""Continuing with another number of processes or other weights: every sample of an epoch once, by record ids."""

import json
import re

import pytest

from tests.data.samples import chat, small_config
from tests.data.test_mixture import mixed
from tests.data.test_pipeline import assert_same
from vr_jax.data.pipeline import make_train_iterator
from vr_jax.data.processor import Processor
from vr_jax.data.skips import TooManySkips
from vr_jax.data.sources import ConcatenatedSource
from vr_jax.data.types import Skip
from vr_jax.errors import UserError
from vr_jax.model.batch import BatchShape

ROWS, COUNT = 6, 331  # rows of all processes
BAD = {4: "malformed_record", 111: "malformed_record", 112: "malformed_record", 330: "malformed_record"}


class Numbers:
    """Texts of many lengths, named by a letter and their index, some of them unusable."""

    def __init__(self, count=COUNT, bad=BAD, letter="n"):
        self.count, self.bad, self.letter = count, bad, letter

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        name = f"{self.letter}{index}"
        if index in self.bad:
            return Skip(name, self.bad[index], "made up")
        return chat("Q" + "x" * (37 * index % 50), f"A{index}", name=name)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, small_config())


class Run:
    """A run on some processes, which are iterators of this process, and what it has read so far."""

    def __init__(self, processor, source, **options):
        self.processor, self.source, self.options = processor, source, {"seed": 5, "prefetch_batches": 1} | options
        self.states, self.used, self.skipped = None, [], []

    def on(self, processes, batches, **options):
        """Continues on a number of processes for some batches, or to the end; as JSON leaves the states."""
        shape = BatchShape(rows=ROWS // processes, tokens=160, tiles=1, tile_size=32)
        iterators = [
            make_train_iterator(
                *(self.source, self.processor, shape),
                **{**self.options, **options, "process_index": k, "process_count": processes},
            )
            for k in range(processes)
        ]
        if self.states is not None:
            for iterator in iterators:
                iterator.set_state(self.states)
        found = [[] for _ in iterators]
        for k, iterator in enumerate(iterators):
            for _ in range(10**6 if batches is None else batches):
                batch = next(iterator, None)
                if batch is None:
                    break
                found[k].append(batch)
                self.used += [name for row in batch.record_ids for name in row]
                self.skipped += [skip.id for skip in batch.skipped]
        self.states = json.loads(json.dumps([iterator.get_state() for iterator in iterators]))
        for iterator in iterators:
            iterator.close()
        return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("numbers", [(2, 3, 1), (3, 2, 6), (1, 6, 3)])
def test_every_sample_of_an_epoch_once_over_two_changes(processor, numbers, shuffle):
    run = Run(processor, Numbers(COUNT), num_epochs=1, shuffle=shuffle)
    run.on(numbers[0], 3)
    run.on(numbers[1], 2)
    assert 0 < len(run.used) < COUNT - 100, "the changes lie within the epoch"
    run.on(numbers[2], None)
    good = [f"n{k}" for k in range(COUNT) if k not in BAD]
    assert sorted(run.used) == sorted(good)
    assert sorted(run.skipped) == sorted(f"n{k}" for k in BAD)


def test_changes_before_the_samples_of_the_first_one_are_read(processor):
    """The samples that the first change left over are dealt again, also those that nobody has read since."""
    run = Run(processor, Numbers(COUNT), num_epochs=1)
    run.on(6, 4)
    for number in (3, 2, 1):
        run.on(number, 1)
    assert any(state["left"] for state in run.states)
    run.on(2, None)
    assert sorted(run.used) == sorted(f"n{k}" for k in range(COUNT) if k not in BAD)


def test_the_same_number_of_processes_continues_bit_for_bit(processor):
    """Also after a change, with what it left over."""
    run = Run(processor, Numbers(COUNT))
    run.on(2, 2)
    for number in (2, 3, 3):
        states = run.states
        expected = run.on(number, 4)
        run.states = states
        first = run.on(number, 2)
        second = run.on(number, 2)
        for k, batches in enumerate(expected):
            assert_same([*first[k], *second[k]], batches)


def test_what_two_processes_skipped_counts_for_the_one_that_continues(processor):
    bad = dict.fromkeys(range(0, COUNT, 9), "malformed_record")
    run = Run(processor, Numbers(COUNT, bad), max_skipped=0.5, packing=False, lookahead=1)
    run.on(2, 20)
    run.on(1, 1)
    skips = run.states[0]["skips"]
    assert sum(skips["counts"].values()) == len(run.skipped)
    assert skips["used"] == len(run.used) + len(run.states[0]["pending"])
    with pytest.raises(TooManySkips) as caught:
        run.on(1, None, max_skipped=0.02)
    told = int(re.match(r"\d+ of (\d+) samples", str(caught.value))[1])
    assert 0 <= told - len(run.used) - len(run.skipped) < 20, "some samples had not come in a batch yet"


def test_what_does_not_fit_is_refused(processor):
    run = Run(processor, Numbers(COUNT))
    run.on(2, 1)
    states = run.states
    run.states = [states[1], states[0]]
    with pytest.raises(UserError, match="do not belong together"):
        run.on(3, 1)
    run.states = states[1]
    with pytest.raises(UserError, match="do not belong together"):
        run.on(1, 1)
    run.states = states
    with pytest.raises(UserError, match="rows: saved 6, now 12"):
        make_train_iterator(
            *(run.source, processor, BatchShape(rows=12, tokens=160, tiles=1, tile_size=32)), seed=5
        ).set_state(states)


def parts(counts):
    return ConcatenatedSource([Numbers(400, {}, "a"), Numbers(800, {}, "b")], "ab", counts)


def test_sources_share_rows_and_batches_know_the_source_of_each_token(processor):
    run = Run(processor, parts((60, 100)), num_epochs=1)
    (batches,) = run.on(1, None)
    assert sorted(one[0] for one in run.used) == ["a"] * 60 + ["b"] * 100
    mixed_rows = 0
    for batch in batches:
        for ids, segments, sources in zip(
            batch.record_ids, batch.batch.segment_ids, batch.batch.token_source, strict=True
        ):
            for segment, name in enumerate(ids, 1):
                assert set(sources[segments == segment]) == {"ab".index(name[0])}
            assert not sources[segments == 0].any()
            mixed_rows += len({name[0] for name in ids}) == 2
    assert mixed_rows > len(batches)


def test_one_source_has_no_numbers_of_sources(processor):
    (batches,) = Run(processor, Numbers(20, {}), num_epochs=1).on(1, None)
    assert all(batch.batch.token_source is None for batch in batches)


def test_other_weights_continue_each_source_where_it_was_if_that_is_allowed(processor):
    """Two changes of the weights and one of the number of processes: 0..n of each source without a gap."""
    run = Run(processor, parts((400, 400)), shuffle=False)
    run.on(2, 2)
    run.source = parts((50, 500))
    with pytest.raises(UserError, match=r"had \[400, 400\] samples of them, now \[50, 500\].*allow_other_weights"):
        run.on(2, 1)
    run.on(2, 1, allow_other_weights=True)
    run.source = parts((300, 300))
    run.on(3, 1, allow_other_weights=True)
    waiting = [place for state in run.states for place in state["pending"]]
    left = [place for state in run.states for place in state["left"][state["next"] :]]
    for number, letter in enumerate("ab"):
        read = [int(name[1:]) for name in run.used if name[0] == letter]
        open_ = [index for stream, index in waiting + left if stream == number]
        assert len(set(read)) == len(read), "no sample came twice"
        reached = {*read, *open_}
        # What is missing are the turns of the slower processes, which stand near the end.
        missing = set(range(max(reached))) - reached
        assert all(one > max(read) - 40 for one in missing)
    run.source = mixed(None)
    with pytest.raises(UserError, match="samples: saved"):
        run.on(3, 1, allow_other_weights=True)
