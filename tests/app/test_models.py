"""The thread of the models: one job after another, in one thread, under the mesh that a checkpoint was loaded under."""

from __future__ import annotations

import contextlib
import threading

import jax
import pytest

from tests.app.made_up import Echo, loader
from tests.inference import tiny
from vr_jax.app import ModelThread, Variant
from vr_jax.errors import UserError
from vr_jax.sharding import make_mesh


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def start(*loaders):
            thread = ModelThread(loaders)
            stack.callback(thread.close)
            return thread

        yield start


def test_jobs_run_in_one_thread_in_their_order(start):
    thread, order = start(), []

    def job(name):
        def run(models):
            for step in range(3):
                order.append((name, step, threading.get_ident()))
                yield name, step

        return run

    runs = [thread.run(job(name)) for name in "ab"]
    assert [next(run) for run in runs] == [("a", 0), ("b", 0)]
    assert [list(run) for run in runs] == [[("a", 1), ("a", 2)], [("b", 1), ("b", 2)]]
    assert [one[:2] for one in order] == [(name, step) for name in "ab" for step in range(3)]
    assert {one[2] for one in order} != {threading.get_ident()}
    assert len({one[2] for one in order}) == 1


def test_an_error_reaches_the_one_who_waits_and_the_thread_goes_on(start):
    thread = start()

    def fails(models):
        yield 1
        raise UserError("no")

    run = thread.run(fails)
    assert next(run) == 1
    with pytest.raises(UserError, match="no"):
        next(run)
    assert list(thread.run(lambda models: iter_of(2))) == [0, 1]


def iter_of(count):
    yield from range(count)


def test_a_job_that_nobody_reads_ends_after_its_step(start):
    thread, ended, go = start(), threading.Event(), threading.Event()

    def endless(models):
        try:
            yield 0
            while True:
                go.wait(10)
                yield 1
        finally:
            ended.set()

    run = thread.run(endless)
    assert next(run) == 0
    run.close()
    go.set()
    assert ended.wait(10)
    assert list(thread.run(lambda models: iter_of(1))) == [0]


def test_another_variant_is_loaded_anew_and_the_same_one_is_kept(start):
    loads, other = [], []
    thread = start(loader(Echo(tiny.config()), loads), loader(Echo(tiny.config()), other))

    def use(number, variant):
        def job(models):
            with models.use(number, variant) as (generator, processor):
                yield generator.model.config is processor.config

        return list(thread.run(job))

    half = Variant(dtype="bfloat16")
    for variant in (Variant(), Variant(), half, half, Variant()):
        assert use(0, variant) == [True]
    use(1, Variant())
    assert loads == [Variant(), half, Variant()]
    assert other == [Variant()]


def test_a_variant_that_cannot_be_loaded_leaves_the_way_back(start):
    loads = []

    @contextlib.contextmanager
    def load(variant):
        loads.append(variant)
        if variant.pruning:
            raise UserError("no such pruner")
        yield Echo(tiny.config()), None

    thread = start(load)

    def use(variant):
        def job(models):
            with models.use(0, variant):
                yield "used"

        return list(thread.run(job))

    assert use(Variant()) == ["used"]
    with pytest.raises(UserError, match="no such pruner"):
        use(Variant(pruning="x"))
    assert use(Variant()) == ["used"]
    assert loads == [Variant(), Variant(pruning="x"), Variant()]


def test_jobs_run_under_the_mesh_that_the_checkpoint_was_loaded_under(start):
    """Loading ends before the jobs do, and the mesh of one checkpoint is not that of the other."""

    def load_under(mesh):
        @contextlib.contextmanager
        def load(variant):
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                yield Echo(tiny.config()), None

        return load

    mesh = make_mesh(1, -1, 2, devices=jax.devices()[:2])
    thread = start(load_under(mesh), load_under(None))

    def seen(models):
        for number in (0, 1, 0):
            with models.use(number, Variant()):
                yield jax.sharding.get_mesh()
        yield jax.sharding.get_mesh()

    first, second, third, outside = thread.run(seen)
    assert first == third == mesh
    assert second.empty
    assert outside.empty
