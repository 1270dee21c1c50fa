"""Every number of every setting and flag has a declared range, which holds at both ends; NaN and infinity are in none.

The classes are found, not listed: all configs that the commands know, all registered methods, all tables of flags.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
import typing
from typing import Annotated, Any

import pytest

import vr_jax.cli
from vr_jax.cli.flags import FlagInfo, Flags, flag, parse
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import Config, Range, check_value, field_types
from vr_jax.model import registry
from vr_jax.settings import TrainConfig, load_config


def subclasses(base: type) -> list[type]:
    """The dataclasses of the package that derive from a class."""
    found = [one for cls in base.__subclasses__() for one in (cls, *subclasses(cls))]
    return [
        one for one in dict.fromkeys(found) if one.__module__.startswith("vr_jax.") and dataclasses.is_dataclass(one)
    ]


def every_config() -> list[type]:
    registry.discover()
    for module in pkgutil.iter_modules(vr_jax.cli.__path__, "vr_jax.cli."):
        importlib.import_module(module.name)
    return subclasses(Config)


def numbers(hint: Any) -> list[tuple[type, Range | None]]:
    """The numbers in an annotation, each with its range."""
    if isinstance(hint, typing.TypeAliasType):
        return numbers(hint.__value__)
    if typing.get_origin(hint) is Annotated:
        kind, *extras = typing.get_args(hint)
        found = next((extra for extra in extras if isinstance(extra, Range)), None)
        return [(kind, found)] if kind in (int, float) else numbers(kind)
    if hint in (int, float):
        return [(hint, None)]
    if typing.get_origin(hint) is typing.Literal:
        return []
    return [one for part in typing.get_args(hint) if part is not Ellipsis for one in numbers(part)]


CONFIGS = every_config()
NUMBERS = [
    (f"{config.__name__}.{name}", kind, allowed)
    for config in CONFIGS
    for name, hint in field_types(config).items()
    for kind, allowed in numbers(hint)
]
RANGES = list(dict.fromkeys((kind, allowed) for _, kind, allowed in NUMBERS))


def test_the_walk_finds_the_settings_the_methods_and_the_flags():
    names = {name for name, _, _ in NUMBERS}
    assert len(names) > 120
    assert {"TrainConfig.steps", "OptimizerSettings.lr_groups", "SvaConfig.width", "Sampling.top_p"} <= names
    assert {"ChatFlags.seed", "PlanFlags.budget", "PrepareFlags.records_per_shard", "StandInFlags.classes"} <= names


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_declares_a_range_that_ends(config):
    for name, hint in field_types(config).items():
        for kind, allowed in numbers(hint):
            assert allowed is not None, f"{config.__name__}.{name} has no Range"
            assert math.isfinite(allowed.low), f"{config.__name__}.{name}: {allowed} has no lower end"
            assert math.isfinite(allowed.high), f"{config.__name__}.{name}: {allowed} has no upper end"
            if kind is int:
                assert isinstance(allowed.low, int)
                assert isinstance(allowed.high, int)


def beyond(kind: type, allowed: Range) -> list[Any]:
    """The values nearest to a range that are outside it, and those that are in no range."""
    if kind is int:
        outside = [allowed.low - 1, allowed.high + 1, 10**400, -(10**400), allowed.low + 0.5]
    else:
        low = allowed.low if allowed.open_low else math.nextafter(allowed.low, -math.inf)
        high = allowed.high if allowed.open_high else math.nextafter(allowed.high, math.inf)
        outside = [low, high, 10**400]
    return [*outside, math.nan, math.inf, -math.inf, "1", True, None, (1,)]


def ends(kind: type, allowed: Range) -> list[Any]:
    """The smallest and the largest value of a range."""
    low = math.nextafter(allowed.low, math.inf) if allowed.open_low else allowed.low
    high = math.nextafter(allowed.high, -math.inf) if allowed.open_high else allowed.high
    return [low, high] if kind is int else [float(low), float(high)]


@pytest.mark.parametrize(("kind", "allowed"), RANGES, ids=str)
def test_a_range_holds_its_ends_and_nothing_beyond_them(kind, allowed):
    hint = Annotated[kind, allowed]
    for value in ends(kind, allowed):
        check_value(hint, value, "the field")
    for value in beyond(kind, allowed):
        with pytest.raises(ConfigError, match=r"^the field = .*: expected (an integer|a finite number) [<>]"):
            check_value(hint, value, "the field")


@pytest.fixture(scope="module")
def demo() -> TrainConfig:
    return load_config("configs/demo.py")


def leaves(config: Config, prefix: str = "") -> list[tuple[str, type, Range]]:
    """The numbers of a config's sections by dotted name."""
    found = []
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, Config):
            found += leaves(value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is Annotated and typing.get_args(hint)[0] in (int, float):
            ((kind, allowed),) = numbers(hint)
            found.append((f"{prefix}{name}", kind, allowed))
    return found


def test_a_command_line_names_the_field_and_its_range(demo):
    """Each number of the demo's config, as text, just outside its range and in no range."""
    for name, kind, allowed in leaves(demo):
        for value in [*beyond(kind, allowed)[:2], "nan", "inf", "", "many", "1e", "0x10"]:
            with pytest.raises(ConfigError) as error:
                demo.override([f"{name}={value}"])
            assert str(error.value).startswith(f"config.{name} = ")
            assert ": expected " in str(error.value)
            assert "\n" not in str(error.value)


TABLES = [config for config in CONFIGS if issubclass(config, Flags) and config is not Flags]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_flag_names_itself_and_its_range(table):
    for field in dataclasses.fields(table):
        info: FlagInfo = field.metadata["flag"]
        if info.positional:
            continue
        name = (info.names or (field.name,))[0]
        for kind, allowed in numbers(field_types(table)[field.name]):
            for value in [*beyond(kind, allowed)[:2], "nan", "inf", "", "many"]:
                message = rf"^{re.escape(f'--{name}={value}')}: expected (an integer|a finite number) "
                with pytest.raises(UserError, match=message):
                    parse(table, [f"--{name}={value}"])


def test_the_walk_would_find_a_number_without_a_range():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Loose(Flags):
        """A flag without a range."""

        size: int = flag(1, "The size.")

    assert numbers(field_types(Loose)["size"]) == [(int, None)]
