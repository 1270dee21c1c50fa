"""Reads config files: what `--config=FILE[:VARIANT]` means to every command."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from vr_jax.errors import ConfigError
from vr_jax.settings.train_config import TrainConfig

CONFIG_FOLDER = "configs"


class RecipeError(ConfigError):
    """A config file or variant that does not exist or cannot be built; one line for the user."""


def load_config(spec: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Reads a config file, applies overrides and checks the result.

    Args:
        spec: FILE or FILE:VARIANT, e.g. "configs/demo.py:uncompressed".
        overrides: Texts FIELD=VALUE, e.g. "optimizer.lr=1e-4" (`TrainConfig.override`).

    Returns:
        The settings of the run.

    Raises:
        ConfigError: The file or the variant does not exist, or the settings cannot work. The message is one line.
    """
    try:
        config = TrainConfig.from_config_dict(read_config_file(spec))
    except ConfigError as error:
        raise ConfigError(f"{spec}: {error}") from error
    overrides = list(overrides)
    return config.override(overrides) if overrides else config


def read_config_file(spec: str | Path) -> ConfigDict:
    """Returns what `get_config(VARIANT)` of FILE:VARIANT returns; without a variant, what `get_config()` returns.

    Raises:
        ConfigError: The file does not exist, is no config file, or refuses the variant.
    """
    name, colon, variant = str(spec).partition(":")
    path = Path(name) if Path(name).is_file() else packaged_config(name)
    if path is None:
        known = ", ".join(packaged_configs())
        raise RecipeError(f"config {name} does not exist; give the path of a file, or a packaged config: {known}")
    found = importlib.util.spec_from_file_location(f"vr_jax_config_{path.stem}", path)
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


load_recipe = read_config_file


def packaged_config(name: str) -> Path | None:
    """Returns the file of a config that comes with the package, e.g. "configs/demo.py", or None if there is no such one.

    An installed package holds the files of `configs/`; in a checkout they stand beside the package.
    """
    folder = _config_folder()
    relative = PurePosixPath(name)
    if folder is None or relative.parts[:1] != (CONFIG_FOLDER,) or ".." in relative.parts:
        return None
    path = folder.joinpath(*relative.parts[1:])
    return path if path.is_file() else None


def packaged_configs() -> list[str]:
    """Returns the names of the configs that come with the package, e.g. "configs/demo.py"."""
    folder = _config_folder()
    if folder is None:
        return []
    return sorted(f"{CONFIG_FOLDER}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py"))


def _config_folder() -> Path | None:
    package = Path(__file__).parents[1]
    installed, checkout = package / CONFIG_FOLDER, package.parent
    if installed.is_dir():
        return installed
    return checkout / CONFIG_FOLDER if (checkout / "pyproject.toml").is_file() else None


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
