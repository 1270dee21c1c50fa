"""Which sample of which source stands at a position: exact counts in an epoch, even rates within it, no state."""

import numpy as np
import pytest

from vr_jax.data.mixture import (
    WINDOW,
    Mixture,
    counts_of_shares,
    counts_of_weights,
    mixture_of,
    samples_of_epoch,
    streams_of,
)
from vr_jax.data.sources import ConcatenatedSource
from vr_jax.data.types import Conversation

LENGTHS = (700, 40, 2300)


class Numbered:
    """Records that are named by the letter of their source and their index."""

    def __init__(self, letter, count, blocks=None):
        self.letter, self.count, self.blocks = letter, count, blocks

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Conversation(f"{self.letter}{index}", ())


def mixed(counts, lengths=LENGTHS, blocks=(None, None, None)):
    parts = zip("abc", lengths, blocks, strict=True)
    return ConcatenatedSource([Numbered(*part) for part in parts], "abc", counts)


def sequence(source, positions, seed=3, shuffle=True):
    """The records at some positions."""
    mixture, streams = mixture_of(source, seed, shuffle=shuffle), streams_of(source, seed, shuffle=shuffle)
    return [streams[stream][index] for stream, index in map(mixture.place, positions)]


def letters(records):
    return "".join(record.id[0] for record in records)


def test_the_counts_of_shares_are_those_of_each_source():
    assert counts_of_shares((100, 30, 7), (0.1, 2.0, 0.5)) == (10, 60, 4)


def test_the_counts_of_weights_fill_an_epoch_of_all_records():
    assert counts_of_weights((70, 20, 10), (1.0, 1.0, 2.0)) == (25, 25, 50)
    assert counts_of_weights((1, 1, 1), (1.0, 1.0, 5.0)) == (1, 0, 2)
    for weights in ((1.0, 2.0, 3.0), (0.3, 0.3, 0.3), (1e-3, 5.0, 7.0)):
        counts = counts_of_weights(LENGTHS, weights)
        assert sum(counts) == sum(LENGTHS)
        np.testing.assert_allclose(counts, sum(LENGTHS) * np.array(weights) / sum(weights), atol=1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_exactly_the_counts_and_each_source_goes_on_where_it_was(shuffle):
    """A tenth of a, each sample of b twice, a half of c: ten epochs read every sample of a once."""
    lengths = (70, 4, 30)
    source = mixed(counts_of_shares(lengths, (0.1, 2.0, 0.5)), lengths)
    epoch = 7 + 8 + 15
    assert samples_of_epoch(source) == epoch
    epochs = [[r.id for r in sequence(source, range(k * epoch, (k + 1) * epoch), shuffle=shuffle)] for k in range(10)]
    for ids in epochs:
        assert [sum(one[0] == letter for one in ids) for letter in "abc"] == [7, 8, 15]
        assert sorted(one for one in ids if one[0] == "b") == sorted(f"b{k}" for k in range(4) for _ in "12")
    assert sorted(one for ids in epochs for one in ids if one[0] == "a") == sorted(f"a{k}" for k in range(70))
    for two in (epochs[0] + epochs[1], epochs[2] + epochs[3]):
        assert sorted(one for one in two if one[0] == "c") == sorted(f"c{k}" for k in range(30))


def test_the_places_of_long_epochs_are_those_of_every_source():
    """An epoch of several windows, the last of which is shorter: no place is left out and none comes twice."""
    counts = (700, 41, 2300)
    mixture = Mixture(counts, (0, 0, 0), seed=3, shuffle=True)
    for epoch in (0, 4):
        found = [mixture.place(epoch * 3041 + k) for k in range(3041)]
        expected = [(s, epoch * count + k) for s, count in enumerate(counts) for k in range(count)]
        assert sorted(found) == expected


def test_the_rates_hold_within_every_window():
    mixture = Mixture(counts_of_weights(LENGTHS, (1.0, 2.0, 5.0)), (0, 0, 0), seed=3, shuffle=True)
    found = "".join("abc"[mixture.place(k)[0]] for k in range(2 * WINDOW))
    for begin in range(0, 2 * WINDOW, WINDOW):
        part = found[begin : begin + WINDOW]
        np.testing.assert_allclose([part.count(letter) for letter in "abc"], WINDOW * np.array([1, 2, 5]) / 8, atol=2)


def test_no_process_gets_one_source_alone():
    """Two sources of one rate would alternate like the turns of two processes."""
    mixture = Mixture((2000, 2000), (0, 0), seed=3, shuffle=True)
    for process in (0, 1):
        first = sum(mixture.place(k)[0] == 0 for k in range(process, WINDOW, 2))
        assert 0.4 < first / (WINDOW / 2) < 0.6


def test_a_place_is_a_function_of_seed_and_position_alone():
    source = mixed(counts_of_weights(LENGTHS, (1.0, 1.0, 1.0)))
    whole = [record.id for record in sequence(source, range(1000, 1040))]
    at = [1039, 1005, 1024, 1000]
    assert [record.id for record in sequence(source, at)] == [whole[k - 1000] for k in at]
    assert [record.id for record in sequence(source, range(1000, 1040), seed=4)] != whole
    assert letters(sequence(source, range(9), shuffle=False)) == "cbacbacba"


def test_records_know_the_number_of_their_source():
    for source in (mixed((10, 20, 30)), mixed(None)):
        assert all("abc"[record.source] == record.id[0] for record in sequence(source, range(100)))


def test_a_source_of_a_mixture_is_read_block_by_block():
    source = mixed((7000, 200, 300), (7000, 200, 300), blocks=(list(range(0, 7000, 100)), None, None))
    records = sequence(source, range(0, WINDOW, 3))
    blocks = {int(record.id[1:]) // 100 for record in records if record.id[0] == "a"}
    assert len(blocks) <= 12, "a window of some 960 of its samples needs few of the 70 blocks"


def test_what_lies_behind_a_window_is_counted_exactly():
    mixture = Mixture((300, 70, 1900), (4, 5, 6), seed=1, shuffle=True)
    for position in (0, 1, WINDOW, WINDOW + 5, 2270, 2271, 5000):
        end = mixture.window_end(position)
        assert position <= end < position + WINDOW
        taken = [mixture.place(k)[0] for k in range(end)]
        expected = [first + taken.count(stream) for stream, first in enumerate(mixture.first)]
        assert list(mixture.behind(end)) == expected
    assert Mixture((300, 70), (0, 0), seed=1, shuffle=False).window_end(7) == 7
