"""Checks the shape annotations of vr_jax while the tests run, by jaxtyping's import hook.

The hook hands every function of a module, and the `__init__` of every dataclass, to `checked`. Only annotations that
contain an array type of jaxtyping are checked, because tests pass substitutes for other objects on purpose. Shape and
element type are checked, and not where an array lives: `Float[Array, "B N"]` also accepts an array of numpy and a
`jax.ShapeDtypeStruct`, since batches are built on the host and programs are planned without arrays. JAXTYPING_DISABLE=1
in the environment switches the checks off.
"""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook


def install(package: Path) -> Any:
    """Checks the modules of a package that import jaxtyping, as they are imported from now on.

    The other modules are left alone, since the hook takes time for every function.

    Args:
        package: The folder of the package, or the file of a single module.

    Returns:
        The hook; its `uninstall` ends the checks of modules that are not yet imported.
    """
    return install_import_hook(list(_annotated_modules(package)), f"{__name__}.checked")


def checked[F: Callable[..., Any]](function: F) -> F:
    """Returns the function with a check of every argument and result that is annotated with an array type."""
    kept = {name: _anywhere(hint) for name, hint in function.__annotations__.items() if _mentions_arrays(hint)}
    if not kept:
        return function
    function.__annotations__ = kept
    return beartype(function)


def _annotated_modules(package: Path) -> Iterator[str]:
    """Yields the dotted names of the modules that mention jaxtyping."""
    for file in [package] if package.is_file() else sorted(package.rglob("*.py")):
        if "jaxtyping" in file.read_text():
            parts = file.relative_to(package.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _mentions_arrays(hint: Any) -> bool:
    """Returns whether an annotation is, or contains, an array type of jaxtyping."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_mentions_arrays, typing.get_args(hint)))


def _anywhere(hint: Any) -> Any:
    """Returns the annotation with every array of JAX replaced by the arrays and shapes that may stand for it."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        if hint.array_type is not jax.Array:
            return hint
        others = tuple(hint.dtype[kind, hint.dim_str] for kind in (np.ndarray, jax.ShapeDtypeStruct))
        return functools.reduce(operator.or_, others, hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None or origin is Callable:
        return hint
    arguments = tuple(map(_anywhere, arguments))
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, arguments)
    return origin[arguments]
