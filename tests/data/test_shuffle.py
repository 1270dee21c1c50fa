"""Blocks of records are shuffled a few at a time, differently in every epoch."""

import pickle

import grain

from vr_jax.data.shuffle import BlockShuffle


def shuffled(seed: int = 7) -> BlockShuffle:
    """The numbers 0..119 in blocks of 10, of which four are mixed at a time."""
    return BlockShuffle(grain.MapDataset.range(120), blocks=range(0, 120, 10), seed=seed)


def epoch(dataset: BlockShuffle, number: int) -> list[int]:
    return [dataset[number * 120 + k] for k in range(120)]


def test_every_record_comes_once_in_windows_of_four_blocks():
    dataset = shuffled()
    first, second = epoch(dataset, 0), epoch(dataset, 1)
    assert sorted(first) == sorted(second) == list(range(120))
    assert first != second
    for window in (first[:40], first[40:80], first[80:]):
        assert len({number // 10 for number in window}) == 4
        assert window != sorted(window)


def test_the_order_of_the_blocks_depends_on_the_epoch():
    dataset = shuffled()
    groups = [{number // 10 for number in epoch(dataset, k)[:40]} for k in (0, 1)]
    assert groups[0] != groups[1] != {0, 1, 2, 3} != groups[0]


def test_the_order_depends_on_the_seed_and_survives_pickling():
    dataset = shuffled()
    assert epoch(pickle.loads(pickle.dumps(dataset)), 1) == epoch(dataset, 1)
    assert epoch(shuffled(8), 0) != epoch(dataset, 0)
    assert [dataset[3:6][k] for k in range(3)] == epoch(dataset, 0)[3:6]
