"""Config files from Python: what `--config=FILE[:VARIANT]` means to train.py and eval.py, for several at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class RecipeError(ValueError):
    """A config file or variant that does not exist or cannot be built; one line for the user."""


def load_recipe(spec: str | Path) -> ConfigDict:
    """The recipe of FILE[:VARIANT]: what the file's `get_config(VARIANT)` returns (without a variant: `get_config()`).

    Raises RecipeError for a file that does not exist, is no config file, or refuses the variant."""
    name, colon, variant = str(spec).partition(":")
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"config {path} does not exist; run from the folder that holds configs/, or give its path")
    found = importlib.util.spec_from_file_location(f"vr_jax_recipe_{path.stem}", path)
    if found is None or found.loader is None:
        raise RecipeError(f"config {path}: expected a Python file with get_config()")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        # Whatever the user's file does wrong is the user's to see, on one line like any other mistake.
        raise RecipeError(f"config {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise RecipeError(f"config {path} has no get_config()")
    try:
        return module.get_config(variant) if colon else module.get_config()
    except (ValueError, TypeError) as error:
        raise RecipeError(f"config {spec}: {error}") from error


def plain(section: Any) -> dict[str, Any]:
    """A recipe's section without ml_collections' types."""
    return section.to_dict() if hasattr(section, "to_dict") else dict(section)


def section_options(
    recipe: Mapping[str, Any], section: str, known: Collection[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a recipe's section, over which flags that are set (not None) win.

    Raises RecipeError for a field that is not one of `known`."""
    values = plain(recipe.get(section) or {})
    if unknown := sorted(set(values) - set(known)):
        raise RecipeError(f"config.{section}: unknown field(s) {unknown}; known: {sorted(known)}")
    return values | {name: value for name, value in flags.items() if value is not None}
