"""Settings and flags that have no effect with others are refused (a leaf module).

The fields that have none with some value of another field are declared in the `no_effect` of their class, for configs
and flags alike (docs/design/decisions.md#decision-30).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vr_jax.errors import ConfigError
from vr_jax.fields import Config, field_types, shown


def check_effects(
    config: Config, where: str = "config.", given: Iterable[str] | None = None, show: Callable[[str], str] = str
) -> None:
    """Checks that no setting is given that has no effect with the others.

    Args:
        config: The config; the declarations of the configs in it are followed too.
        where: What stands before the names of fields in messages.
        given: Dotted names of the fields that the user gave. None takes those whose values differ from their defaults,
            which is all that can be told of a file that shows every number of its run.
        show: Turns the dotted name of a field into what the user writes for it.

    Raises:
        ConfigError: A given setting has no effect; the message names it and the setting that makes it so.
    """
    names = None if given is None else list(given)
    for path, owner in _configs(config):
        for rule in owner.no_effect:
            if not rule.when(owner):
                continue
            for field in rule.fields:
                found = _changed(owner, field) if names is None else _within(names, f"{path}{field}", len(path))
                for name in found:
                    if _is_off(_at(owner, name)):
                        continue
                    raise ConfigError(
                        f"{where}{show(path + name)} = {shown(_at(owner, name))} has no effect with "
                        f"{where}{show(path + rule.because)} = {shown(_at(owner, rule.because))}: {rule.why}"
                    )


def _is_off(value: Any) -> bool:
    """Whether a value switches something off, which is in accord with a setting that leaves it without effect."""
    return value is None or value is False or value in ("", "none", ())


def _configs(config: Config, path: str = "") -> Iterator[tuple[str, Config]]:
    """Yields a config and all configs in it, each with the dotted name of its section and a last dot."""
    yield path, config
    for name in field_types(type(config)):
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from _configs(value, f"{path}{name}.")
        elif isinstance(value, Mapping):
            for key, one in value.items():
                if isinstance(one, Config):
                    yield from _configs(one, f"{path}{name}.{key}.")


def _changed(config: Config, field: str) -> list[str]:
    """The fields at or below a dotted name whose values are not their defaults."""
    name, _, rest = field.partition(".")
    value = getattr(config, name)
    if isinstance(value, Config):
        below = [rest] if rest else list(field_types(type(value)))
        return [f"{name}.{found}" for one in below for found in _changed(value, one)]
    return [] if value == _default(type(config), name) else [name]


def _within(names: Iterable[str], field: str, prefix: int) -> list[str]:
    """Those of the names that stand for a field or for one below it, without a prefix of so many characters."""
    return [name[prefix:] for name in names if f"{name}.".startswith(f"{field}.")]


def _at(config: Any, field: str) -> Any:
    """The value of a field by its dotted name."""
    for name in field.split("."):
        config = getattr(config, name)
    return config


def _default(cls: type, name: str) -> Any:
    """The default value of a field; MISSING where it has none."""
    (found,) = (f for f in dataclasses.fields(cls) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
