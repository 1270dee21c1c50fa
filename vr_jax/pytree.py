"""Frozen dataclasses of arrays that are JAX pytrees (a leaf module)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, dataclass_transform, overload

import jax
from jax.tree_util import GetAttrKey


@overload
def array_dataclass[T](cls: type[T]) -> type[T]: ...


@overload
def array_dataclass[T](*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def array_dataclass[T](cls: type[T] | None = None, *, kw_only: bool = False) -> Any:
    """Makes a class a frozen dataclass and registers it as a JAX pytree.

    Fields are children of the node, except those declared with `field(metadata={"static": True})`, which become part of
    the tree's structure and have to be hashable. The key path of a child is its attribute, as with
    `jax.tree_util.register_dataclass`. Unlike there, JAX rebuilds instances without calling `__init__`: an `__init__`
    that checks its arguments (jaxtyping's import hook adds one) would reject the leaves that `jax.tree.map`, `jax.vmap`
    and `jax.eval_shape` put in place of arrays.

    Args:
        cls: The class to convert, when used as `@array_dataclass`.
        kw_only: Whether `__init__` accepts keyword arguments only, when used as `@array_dataclass(kw_only=True)`.

    Returns:
        The class, or the decorator if `cls` is absent.
    """
    if cls is None:
        return lambda cls: _register(cls, kw_only)
    return _register(cls, kw_only)


def _register[T](cls: type[T], kw_only: bool) -> Any:
    node: Any = dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
    static = tuple(f.name for f in dataclasses.fields(node) if f.metadata.get("static", False))
    children = tuple(f.name for f in dataclasses.fields(node) if f.name not in static)
    keys = tuple(GetAttrKey(name) for name in children)

    def values(instance: T, names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(getattr(instance, name) for name in names)

    def flatten(instance: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return values(instance, children), values(instance, static)

    def flatten_with_keys(instance: T) -> tuple[Iterable[tuple[GetAttrKey, Any]], tuple[Any, ...]]:
        return tuple(zip(keys, values(instance, children), strict=True)), values(instance, static)

    def unflatten(static_values: tuple[Any, ...], leaves: Iterable[Any]) -> Any:
        instance = object.__new__(node)
        for name, value in zip(children + static, (*leaves, *static_values), strict=True):
            object.__setattr__(instance, name, value)  # the class is frozen
        return instance

    jax.tree_util.register_pytree_with_keys(node, flatten_with_keys, unflatten, flatten)
    return node
