"""Evaluation with parameters that training holds: nothing is copied, cast, written or compiled again."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import pytest

from tests.compilations import compilations
from tests.evaluation import words
from tests.inference import tiny
from vr_jax.data.processor import Processor
from vr_jax.evaluation import Evaluator, evaluate_items
from vr_jax.inference import Generator
from vr_jax.sharding import make_mesh, param_shardings
from vr_jax.training.state import ModelTree

BENCHMARK = words.Words()
ITEMS = words.items()[1:6]


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(Processor(tiny.TOKENIZER, tiny.config()), buckets=tiny.BUCKETS)


@pytest.fixture(scope="module")
def tree():
    return ModelTree(tiny.config())


def trained(tree: ModelTree, seed: int) -> dict[str, jax.Array]:
    """Parameters as a training holds them: by path, the encoder's frozen ones in bfloat16."""
    params = tree.flatten(tiny.model(tiny.config(), seed))
    return {
        path: value.astype(jnp.bfloat16 if path.startswith("encoder") else value.dtype)
        for path, value in params.items()
    }


def evaluated(evaluator, model, **options):
    return evaluator.evaluate(model, BENCHMARK, ITEMS, batch_size=4, **options)


def large(arrays) -> int:
    """The number of arrays on the devices that are as large as the parameters of a stage of the decoder."""
    gc.collect()
    return sum(array.size >= 24 * 24 and array.ndim > 2 for array in arrays)


def test_replies_and_scores_are_those_of_a_loaded_model(evaluator, tree):
    model = tree.build(trained(tree, 0))
    plain = Generator(model, tiny.TOKENIZER, tiny.BUCKETS)
    expected = evaluate_items(plain, evaluator.processor, BENCHMARK, ITEMS, batch_size=4, progress=False)
    found = evaluated(evaluator, model)
    assert found.results == expected.results
    assert any(result.prediction for result in found.results)
    assert found.summary["score"] == expected.summary["score"]


def test_other_parameters_compile_nothing_and_are_the_ones_that_answer(evaluator, tree):
    first, second = (tree.build(trained(tree, seed)) for seed in (0, 1))
    before = evaluated(evaluator, first)
    programs = evaluator.programs
    with compilations() as compiled:
        after = evaluated(evaluator, second)
    assert compiled == []
    assert evaluator.programs == programs
    assert [one.prediction for one in after.results] != [one.prediction for one in before.results]


def test_no_array_of_the_model_is_copied(evaluator, tree, monkeypatch):
    """While the last step of decoding runs, the only large arrays on the devices are the model's own."""
    params = trained(tree, 0)
    model = tree.build(params)
    pointers = {path: value.unsafe_buffer_pointer() for path, value in params.items()}
    seen: list[tuple[int, list[int]]] = []
    decode = Generator.decode

    def watched(self, state, *arguments):
        seen.append((large(jax.live_arrays()), [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(self.model)]))
        assert all(a is b for a, b in zip(jax.tree.leaves(self._decoding_model), params.values(), strict=True))
        done = decode(self, state, *arguments)
        seen.append((large(jax.live_arrays()), seen[-1][1]))
        return done

    monkeypatch.setattr(Generator, "decode", watched)
    idle = large(jax.live_arrays())
    evaluated(evaluator, model)
    cache = 2  # keys and values of the one decoder stage, which the state holds
    assert seen
    for count, found in seen:
        assert found == list(pointers.values())
        assert count <= idle + cache + 2  # and the pixels and the heights of the batch
    assert large(jax.live_arrays()) == idle


def test_an_ordinary_generator_on_one_cpu_does_copy_the_layers(tree):
    """The fault that the test above is for."""
    model = tree.build(trained(tree, 0))
    generator = Generator(model, tiny.TOKENIZER, tiny.BUCKETS)
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)}
    decoding = jax.tree.leaves(generator._decoding_model)  # noqa: SLF001
    assert any(leaf.unsafe_buffer_pointer() not in own for leaf in decoding)


def test_parameters_may_be_donated_between_evaluations(evaluator, tree):
    """An update of a training deletes the arrays that the evaluation before it used."""
    params = trained(tree, 0)
    before = evaluated(evaluator, tree.build(params))
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 1, tree), donate_argnums=0)
    after = update(params)
    assert all(leaf.is_deleted() for leaf in params.values())
    assert evaluated(evaluator, tree.build(after)).results == before.results


def test_nothing_is_written_without_a_folder(evaluator, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated(evaluator, tree.build(trained(tree, 0)))
    assert list(tmp_path.rglob("*")) == []
    evaluated(evaluator, tree.build(trained(tree, 0)), output=tmp_path / "out")
    assert (tmp_path / "out" / "items.jsonl").stat().st_size > 0


def test_another_model_is_refused(evaluator):
    with pytest.raises(ValueError, match="another config"):
        evaluated(evaluator, tiny.model(tiny.config(vision_remember=False)))


@pytest.mark.slow  # It compiles for eight devices.
def test_parameters_stay_sharded_as_training_shards_them(evaluator, tree):
    """On the mesh of a training, the replies are those of one device, and no parameter moves."""
    params = trained(tree, 0)
    expected = evaluated(evaluator, tree.build(params))
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    where = param_shardings(tree.shapes, mesh)
    sharded = {path: jax.device_put(value, where[path]) for path, value in params.items()}
    with jax.set_mesh(mesh):
        found = evaluated(evaluator, tree.build(sharded))
    assert [one.prediction for one in found.results] == [one.prediction for one in expected.results]
    assert {path: value.sharding for path, value in sharded.items()} == dict(where)
