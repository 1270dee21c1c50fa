"""Fields of dataclasses are checked from their annotations, and configs come back from their JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vr_jax.errors import ConfigError
from vr_jax.fields import (
    Config,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check_names,
    check_value,
    describe,
)

type Widths = tuple[PositiveInt, ...]


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """A nested config whose combination of fields is checked."""

    low: NonNegativeInt = 0
    high: NonNegativeInt = 10

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.high:
            raise ConfigError(f"Inner.low = {self.low} is above Inner.high = {self.high}")


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    """A config with a field of every kind."""

    count: PositiveInt = 1
    rate: PositiveFloat = 1e-3
    share: Fraction = 0.5
    angle: Annotated[float, Range(-math.pi, math.pi, open_high=True)] = 0.0
    flag: bool = False
    label: str = ""
    mode: Literal["slow", "fast", 3] = "slow"
    limit: PositiveInt | None = None
    widths: Widths = (8, 16)
    grid: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    pair: tuple[int, str] = (0, "")
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    weights: Mapping[str, PositiveFloat] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Demanding(Config):
    """A config with fields that have no default."""

    width: PositiveInt
    depth: PositiveInt
    name: str = "a"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 0, "an integer >= 1"),
        ("count", 1.0, "an integer >= 1"),
        ("count", True, "an integer >= 1"),
        ("count", "1", "an integer >= 1"),
        ("rate", 0.0, "a finite number >= 1e-30"),
        ("rate", math.nan, "a finite number >= 1e-30"),
        ("rate", math.inf, "a finite number >= 1e-30"),
        ("rate", True, "a finite number >= 1e-30"),
        ("share", 1.5, "a finite number >= 0 and <= 1"),
        ("share", math.nan, "a finite number >= 0 and <= 1"),
        ("angle", math.pi, "a finite number >= -3.14159265 and < 3.14159265"),
        ("flag", 1, "True or False"),
        ("label", None, "a text"),
        ("mode", "medium", "one of 'slow', 'fast', 3"),
        ("mode", 3.0, "one of 'slow', 'fast', 3"),
        ("limit", 0, r"an integer >= 1 .* or nothing \(None\)"),
        ("widths", (8, 0), "a sequence, each element an integer >= 1"),
        ("widths", [8], "a sequence, each element an integer >= 1"),
        ("grid", ((1, 2, 3),), r"a sequence, each element \(an integer >= 1 .*, an integer >= 1 .*\)"),
        ("pair", (1, 2), r"\(an integer, a text\)"),
        ("inner", {"low": 1}, "a value of the type Inner"),
        ("many", (None,), "a sequence, each element a value of the type Inner"),
        ("weights", {"a": 0.0}, "a mapping of names to values, each a finite number >= 1e-30"),
        ("weights", {1: 1.0}, "a mapping of names to values"),
        ("extra", (), "a mapping of names to values, each any value"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^Outer\.{name} = .*: expected {expected}"):
        Outer(**{name: value})


def test_right_values_are_kept():
    values = {
        "count": 2**31 - 1,
        "rate": 3,
        "share": 1,
        "angle": -math.pi,
        "mode": 3,
        "limit": 5,
        "grid": ((1, 2), (3, 4)),
        "pair": (-1, "x"),
        "maybe": Inner(low=1),
        "weights": {"a": 1},
        "extra": {"a": [None]},
    }
    config = Outer(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigError, match=r"Outer\.count = 'x{199}\.\.\.: expected an integer") as error:
        Outer(count="x" * 10_000)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(), [0.0, -1e300, 1e300], [math.nan, math.inf, -math.inf]),
        (Range(0, 1), [0, 1, 0.5], [-1e-9, 1 + 1e-9, math.nan]),
        (Range(0, 1, open_low=True, open_high=True), [0.5], [0, 1, -0.0]),
        (Range(high=3), [-math.pi, 3], [3.1, -math.inf]),
    ],
)
def test_ranges(limits, inside, outside):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)


def test_descriptions_of_ranges():
    assert str(Range(0, 1, open_high=True)) == ">= 0 and < 1"
    assert str(Range()) == ""
    assert describe(Annotated[int, Range()]) == "an integer"


def test_messages_name_the_path_of_a_nested_field():
    with pytest.raises(ConfigError, match=r"^config\.inner\.low = -1: expected an integer >= 0"):
        Outer.from_dict({"inner": {"low": -1}}, "config")
    with pytest.raises(ConfigError, match=r"^config\.many\[1\]\.high = 'a': expected an integer"):
        Outer.from_dict({"many": [{}, {"high": "a"}]}, "config")
    with pytest.raises(ConfigError, match=r"^Outer\.maybe has no field 'lo'; did you mean 'low'\? it has high, low$"):
        Outer.from_dict({"maybe": {"lo": 1}})
    with pytest.raises(ConfigError, match=r"^Outer\.inner\.low = 3 is above Outer\.inner\.high = 2"):
        Outer.from_dict({"inner": {"low": 3, "high": 2}})


def test_unknown_names_are_refused_with_the_nearest_and_all_known_ones():
    with pytest.raises(ConfigError, match=r"^x has no field 'rats'; did you mean 'rate'\? it has count, rate$"):
        check_names(["count", "rats"], ["rate", "count"], "x")
    with pytest.raises(ConfigError, match=r"^x has no field 'zzz'; it has count, rate$"):
        check_names(["zzz"], ["rate", "count"], "x")
    check_names([], [], "x")


def test_absent_fields_keep_their_defaults_or_are_named():
    assert Outer.from_dict({}) == Outer()
    assert Demanding.from_dict({"width": 1, "depth": 2}) == Demanding(width=1, depth=2)
    with pytest.raises(ConfigError, match=r"^config\.a lacks width, depth: a field without a default has to be given"):
        Demanding.from_dict({"name": "b"}, "config.a")


def test_configs_are_rebuilt_from_what_json_holds():
    config = Outer.from_dict({"rate": 1, "grid": [[1, 2]], "pair": [1, "a"], "maybe": {"low": 1}, "many": [{}]})
    assert config == Outer(rate=1.0, grid=((1, 2),), pair=(1, "a"), maybe=Inner(low=1), many=(Inner(),))
    assert type(config.rate) is float
    with pytest.raises(ConfigError, match=r"Outer\.pair = \(1, 'a', 2\): expected \(an integer, a text\)"):
        Outer.from_dict({"pair": [1, "a", 2]})
    with pytest.raises(ConfigError, match=r"Outer\.inner = 3: expected a value of the type Inner"):
        Outer.from_dict({"inner": 3})


def test_values_without_a_config_can_be_checked():
    check_value(tuple[PositiveInt, ...] | None, None, "x")
    with pytest.raises(
        ConfigError, match=r"^x = \(0,\): expected a sequence, each element an integer >= 1 .* or nothing"
    ):
        check_value(tuple[PositiveInt, ...] | None, (0,), "x")


positive = st.integers(1, 2**31 - 1)
floats = st.floats(min_value=1e-30, max_value=1e30)
inner = st.builds(lambda a, b: Inner(low=min(a, b), high=max(a, b)), st.integers(0, 99), st.integers(0, 99))
outer = st.builds(
    Outer,
    count=positive,
    rate=floats,
    share=st.floats(0, 1),
    angle=st.floats(-math.pi, math.pi, exclude_max=True),
    flag=st.booleans(),
    label=st.text(),
    mode=st.sampled_from(["slow", "fast", 3]),
    limit=st.none() | positive,
    widths=st.lists(positive, max_size=4).map(tuple),
    grid=st.lists(st.tuples(positive, positive), max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    inner=inner,
    maybe=st.none() | inner,
    many=st.lists(inner, max_size=3).map(tuple),
    weights=st.dictionaries(st.text(), floats, max_size=3),
    extra=st.dictionaries(st.text(), st.none() | st.booleans() | st.text() | st.lists(st.integers()), max_size=3),
)


@given(outer)
def test_every_config_comes_back_from_its_json_form(config):
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
