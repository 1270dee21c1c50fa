"""Reads config files: what `--config=FILE[:VARIANT]` means to every command."""

from __future__ import annotations

import difflib
import importlib.util
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ml_collections import ConfigDict

from vr_jax.effects import check_effects
from vr_jax.errors import ConfigError
from vr_jax.fields import check, field_types
from vr_jax.path_text import is_bucket
from vr_jax.settings.train_config import TrainConfig
from vr_jax.storage import on_disk

CONFIG_FOLDER = "configs"


def load_config(
    spec: str | Path, overrides: Iterable[str] = (), *, sections: Collection[str] | None = None
) -> TrainConfig:
    """Reads a config file, applies overrides and checks the result.

    Args:
        spec: FILE or FILE:VARIANT, e.g. "configs/demo.py:uncompressed".
        overrides: Texts FIELD=VALUE, e.g. "optimizer.lr=1e-4" (`TrainConfig.override`).
        sections: The fields of `TrainConfig` that the caller reads, so that an override of another one is refused. None
            takes all.

    Returns:
        The settings of the run.

    Raises:
        ConfigError: The file or the variant does not exist, the settings cannot work, or one of them has no effect with
            the others. The message is one line.
    """
    values = read_config_file(spec)
    try:
        config = TrainConfig.from_config_dict(values)
        check_effects(config)
    except ConfigError as error:
        raise ConfigError(f"{spec}: {error}") from error
    overrides = list(overrides)
    if sections is not None:
        _check_sections(overrides, sections)
    return config.override(overrides) if overrides else config


def _check_sections(overrides: Iterable[str], sections: Collection[str]) -> None:
    """Raises ConfigError for an override of a setting that the command does not read."""
    for override in overrides:
        name = override.partition("=")[0]
        section = name.partition(".")[0]
        check(
            section in sections or section not in field_types(TrainConfig),
            f"config.{name} has no effect on this command: it reads nothing of config.{section}",
        )


def read_config_file(spec: str | Path) -> ConfigDict:
    """Returns the ConfigDict of a config file: that of `get_config(VARIANT)`, or of `get_config()` without a variant.

    Args:
        spec: FILE or FILE:VARIANT. A file that does not exist is looked up among the configs of the package.

    Raises:
        ConfigError: The file does not exist, cannot be run, or refuses the variant.
    """
    name, colon, variant = split_variant(str(spec))
    own = on_disk(name) if is_bucket(name) else Path(name)
    path = own if own.is_file() else packaged_config(name)
    if path is None:
        known = packaged_configs()
        stems = {PurePosixPath(config).stem: config for config in known}
        near = difflib.get_close_matches(PurePosixPath(name).stem, stems, 1)
        hint = f"did you mean {stems[near[0]]}? " if near else ""
        raise ConfigError(
            f"config {name} does not exist; {hint}give the path of a file, or a packaged config: {', '.join(known)}"
        )
    found = importlib.util.spec_from_file_location(f"vr_jax_config_{path.stem}", path)
    if found is None or found.loader is None:
        raise ConfigError(f"config {path}: expected a Python file with a function get_config")
    module = importlib.util.module_from_spec(found)
    with _code_of(f"config {path} cannot be run", path):
        found.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"config {path} has no function get_config")
    with _code_of(f"config {spec}", path, refuses=True):
        values = module.get_config(variant) if colon else module.get_config()
    if not isinstance(values, ConfigDict | Mapping):
        raise ConfigError(f"config {spec}: get_config returned {type(values).__name__}; expected a ConfigDict")
    with _code_of(f"config {spec}: what get_config returned is no ConfigDict", path):
        found_values = values if isinstance(values, ConfigDict) else ConfigDict(dict(values))
        found_values.to_dict()  # A field that must be set, and is not, fails here.
    return found_values


@contextmanager
def _code_of(where: str, path: Path, *, refuses: bool = False) -> Iterator[None]:
    """Makes one line of whatever the code of a config file raises: the user sees it like any other mistake.

    Args:
        where: The beginning of the line.
        path: The config file.
        refuses: Whether a ValueError is the file's own refusal of a variant, which needs no place in the file.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        if refuses and isinstance(error, ValueError):
            raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
        raise ConfigError(f"{where}: {_place(error, path)}{_one_line(error)}") from error


def split_variant(spec: str) -> tuple[str, str, str]:
    """Splits FILE:VARIANT at the colon behind ".py". A file that exists is never split; folders' names may hold colons.

    Returns:
        The file, the colon (empty where there is none), and the variant. A file that does not exist ends at the first
        colon.
    """
    if Path(spec).is_file():
        return spec, "", ""
    colons = [k for k, one in enumerate(spec) if one == ":"]
    for k in colons:  # The names of a folder may hold a colon, and a variant may hold a slash.
        if Path(spec[:k]).is_file() or packaged_config(spec[:k]) is not None:
            return spec[:k], ":", spec[k + 1 :]
    before, colon, after = spec.rpartition(":")
    return (before, colon, after) if colon and "/" not in after else (spec, "", "")


def packaged_config(name: str) -> Path | None:
    """Returns the file of a config that comes with the package, e.g. "configs/demo.py", or None if there is none.

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


def _place(error: BaseException, path: Path) -> str:
    """The line of the config file at which an error was raised, for a message."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return f"line {lines[-1]}: " if lines and lines[-1] else ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
