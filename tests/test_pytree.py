"""Dataclasses of arrays: their key paths, and that JAX rebuilds them without `__init__`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.pytree import array_dataclass


@array_dataclass(kw_only=True)
class Pair:
    """Two arrays and a static number; `__init__` accepts arrays only, as under jaxtyping's import hook."""

    first: jax.Array
    second: dict[str, jax.Array]
    count: int = dataclasses.field(default=3, metadata={"static": True})

    def __post_init__(self):
        assert isinstance(self.first, jax.Array)
        assert all(isinstance(value, jax.Array) for value in self.second.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Registered:
    """The same fields registered by JAX itself."""

    first: jax.Array
    second: dict[str, jax.Array]
    count: int = dataclasses.field(default=3, metadata={"static": True})


def example(cls=Pair, **fields):
    return cls(first=jnp.arange(4.0), second={"a": jnp.ones((4, 2))}, **fields)


def test_key_paths_and_leaves_are_those_of_register_dataclass():
    ours, _ = jax.tree_util.tree_flatten_with_path(example())
    theirs, _ = jax.tree_util.tree_flatten_with_path(example(Registered))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert [jax.tree_util.keystr(path) for path, _ in ours] == [".first", ".second['a']"]
    jax.tree.map(np.testing.assert_array_equal, [leaf for _, leaf in ours], [leaf for _, leaf in theirs])


def test_leaves_that_init_rejects_pass_through_transformations():
    pair = example()
    names = jax.tree.map(lambda leaf: str(leaf.shape), pair)
    assert names.first == "(4,)"
    assert names.second == {"a": "(4, 2)"}
    shapes = jax.eval_shape(lambda value: value, pair)
    assert shapes.second["a"] == jax.ShapeDtypeStruct((4, 2), jnp.float32)
    doubled = jax.vmap(lambda value: jax.tree.map(lambda leaf: 2 * leaf, value))(pair)
    np.testing.assert_array_equal(doubled.first, 2 * pair.first)
    _, stacked = jax.lax.scan(lambda carry, value: (carry, value), 0, pair)
    np.testing.assert_array_equal(stacked.second["a"], pair.second["a"])


def test_static_fields_are_structure_and_cause_a_new_trace():
    traced = []

    @jax.jit
    def total(pair):
        traced.append(pair.count)
        return pair.first.sum() * pair.count

    assert total(example()) == 18
    assert total(example()) == 18
    assert total(example(count=5)) == 30
    assert traced == [3, 5]
    assert jax.tree.structure(example()) != jax.tree.structure(example(count=5))


def test_instances_are_frozen_and_replaceable():
    pair = jax.tree.map(jnp.negative, example(count=7))
    assert dataclasses.replace(pair, first=jnp.zeros(1)).count == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.count = 1


def test_fields_may_be_positional_without_kw_only():
    @array_dataclass
    class Single:
        value: jax.Array

    assert jax.tree.leaves(Single(jnp.int32(2))) == [2]
