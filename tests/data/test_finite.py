"""A finite iteration: every sample once over all processes, and as many batches on one process as on the others."""

import threading

import numpy as np
import pytest

from tests.data.samples import small_config
from tests.data.test_pipeline import BAD, COUNT, Numbers, names
from vr_jax.data.finite import make_finite_iterator
from vr_jax.data.processor import Processor
from vr_jax.model.batch import BatchShape

SHAPE = BatchShape(rows=2, tokens=160, tiles=9, tile_size=32)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, small_config())


def on_processes(count, processor, source, **options):
    """The batches of each of several processes, which are threads here, and agree through a barrier."""
    barrier, told, found = threading.Barrier(count, timeout=60), [False] * count, [[] for _ in range(count)]

    def run(index):
        def any_process(mine):
            told[index] = mine
            barrier.wait()
            result = any(told)
            barrier.wait()
            return result

        iterator = make_finite_iterator(
            source, processor, SHAPE, process_index=index, process_count=count, any_process=any_process, **options
        )
        found[index] += iterator

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_once_in_as_many_batches_on_each_process(processor, processes, packing):
    found = on_processes(processes, processor, Numbers(), packing=packing)
    good = [f"n{k}" for k in range(COUNT) if k not in BAD]
    assert sorted(name for one in found for name in names(one)) == sorted(good)
    skipped = [(skip.id, skip.reason) for one in found for batch in one for skip in batch.skipped]
    assert sorted(skipped) == sorted((f"n{k}", reason) for k, reason in BAD.items())
    assert len({len(one) for one in found}) == 1
    assert all(batch.batch.tokens.shape == (2, 160) for one in found for batch in one)
    longest = max(len(row) for one in found for batch in one for row in batch.record_ids)
    assert (longest > 1) == packing


def test_without_packing_the_samples_stand_in_their_order(processor):
    assert names(on_processes(1, processor, Numbers(6, {}), packing=False)[0]) == [f"n{k}" for k in range(6)]


def test_a_process_without_samples_gets_empty_rows(processor):
    """Of five samples four cannot be used, and the sixth process has none at all."""
    found = on_processes(6, processor, Numbers(5, dict.fromkeys([0, 1, 3, 4], "malformed_record")))
    assert [len(one) for one in found] == [1] * 6
    assert [names(one) for one in found] == [[], [], ["n2"], [], [], []]
    assert not np.any(found[5][0].batch.segment_ids)


def test_a_limit_of_batches_holds_for_all_processes(processor):
    found = on_processes(2, processor, Numbers(), max_batches=2, packing=False)
    assert [len(one) for one in found] == [2, 2]


def test_an_iterator_that_is_left_early_ends_its_threads(processor):
    with make_finite_iterator(Numbers(), processor, SHAPE) as iterator:
        next(iterator)
    assert list(iterator) == []


def test_the_index_of_the_process_must_exist(processor):
    with pytest.raises(ValueError, match=r"process_index = 3: expected 0\.\.2"):
        make_finite_iterator(Numbers(), processor, SHAPE, process_index=3, process_count=3)
