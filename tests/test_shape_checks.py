"""The shape annotations are checked while the tests run, and a wrong one fails."""

from __future__ import annotations

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.shape_checks import install
from vr_jax.kernels.window_attention import reference

PLANTED = """
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vr_jax.pytree import array_dataclass


def wrong_result(x: Float[Array, "rows width"]) -> Float[Array, "rows"]:
    return jnp.sum(x, axis=0)  # one value per column


def nested(levels: dict[int, Float[Array, "rows width"]], other: Float[Array, "rows"]) -> None:
    pass


class Module(nnx.Module):
    def __call__(self, x: Float[Array, "rows width"]) -> Int[Array, "rows width"]:
        return x


@array_dataclass
class Pair:
    first: Float[Array, "rows width"]
    second: Float[Array, "rows"]


def unchecked(number: int) -> str:
    return number
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A module with wrong annotations, imported under the hook."""
    folder = tmp_path_factory.mktemp("planted")
    file = folder / "planted_annotations.py"
    file.write_text(PLANTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        hook = install(file)
        try:
            yield importlib.import_module("planted_annotations")
        finally:
            hook.uninstall()
            sys.modules.pop("planted_annotations", None)


def test_a_wrong_result_fails_also_while_it_is_traced(planted):
    x = jnp.ones((2, 3))
    for function in (planted.wrong_result, jax.jit(planted.wrong_result)):
        with pytest.raises(TypeError, match=r"return value of planted_annotations\.wrong_result"):
            function(x)


def test_methods_and_containers_of_arrays_are_checked(planted):
    with pytest.raises(TypeError, match=r"Module\.__call__"):
        planted.Module()(jnp.ones((2, 3)))
    planted.nested({1: jnp.ones((2, 3))}, jnp.ones(2))
    with pytest.raises(TypeError, match="nested"):
        planted.nested({1: jnp.ones((2, 3))}, jnp.ones(3))


def test_array_dataclasses_are_checked_when_built_and_not_when_jax_rebuilds_them(planted):
    with pytest.raises(TypeError, match="Pair"):
        planted.Pair(jnp.ones((2, 3)), jnp.ones(3))
    pair = planted.Pair(jnp.ones((2, 3)), jnp.ones(2))
    assert jax.tree.map(np.shape, pair).second == (2,)
    assert jax.vmap(lambda one: one.first.sum() + one.second)(pair).shape == (2,)
    assert jax.eval_shape(lambda one: one, pair).first.shape == (2, 3)


def test_arrays_of_numpy_and_shapes_without_arrays_are_checked_like_arrays(planted):
    for make in (np.zeros, jax.ShapeDtypeStruct):
        assert planted.Pair(make((2, 3), np.float32), make((2,), np.float32)).first.shape == (2, 3)
        with pytest.raises(TypeError, match="Pair"):
            planted.Pair(make((2, 3), np.float32), make((3,), np.float32))


def test_other_annotations_are_not_checked(planted):
    assert planted.unchecked("text") == "text"


def test_the_package_is_checked_in_this_session():
    with pytest.raises(TypeError, match="window_weights"):
        reference.window_weights(jnp.ones((2, 3, 4)), jnp.ones((2, 5, 1, 6)), None, 1.0)
