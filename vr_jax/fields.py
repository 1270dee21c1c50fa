"""Frozen dataclasses whose fields are checked from their annotations (a leaf module).

The configs of the model, `TrainConfig` and the flags of all commands derive from `Config`. A field declares everything
that is checked about it in its annotation: its type, the choices of a `Literal`, and the `Range` of a number.
Combinations of fields that cannot work are checked in the class's own `__post_init__`. Fields that have no effect with
the value of another one are declared in the class's `no_effect` (docs/design/decisions.md#decision-30).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, Union

from vr_jax.errors import ConfigError
from vr_jax.path_text import PathMark, check_path_text


@dataclass(frozen=True)
class Range:
    """The values that a number may have. NaN and infinity are in no range.

    Attributes:
        low: The smallest value; by default every finite number is large enough.
        high: The largest value; by default every finite number is small enough.
        open_low: Whether `low` itself is excluded.
        open_high: Whether `high` itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Returns whether a number is finite and within the bounds."""
        if not _finite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """Returns the bounds as messages show them, e.g. ">= 0 and < 1"."""
        parts = []
        if math.isfinite(self.low):
            parts.append(f"{'>' if self.open_low else '>='} {_bound(self.low)}")
        if math.isfinite(self.high):
            parts.append(f"{'<' if self.open_high else '<='} {_bound(self.high)}")
        return " and ".join(parts)


def _bound(value: float) -> str:
    """A bound as messages show it: integers with all their digits, other numbers with as many as they need."""
    return str(value) if isinstance(value, int) else f"{value:.9g}"


@dataclass(frozen=True)
class NotEmpty:
    """The texts with at least one character that is no space."""

    def __contains__(self, value: str) -> bool:
        """Returns whether a text says something."""
        return bool(value.strip())

    def __str__(self) -> str:
        """Returns what messages say behind the kind of the value."""
        return "that is not empty"


@dataclass(frozen=True)
class Distinct:
    """The sequences that hold no element twice."""

    def __contains__(self, value: tuple[Any, ...]) -> bool:
        """Returns whether all elements differ."""
        return all(one not in value[:i] for i, one in enumerate(value))

    def __str__(self) -> str:
        """Returns what messages say behind the kind of the value."""
        return "and no element twice"


# What arrays of int32 and float32 hold, with some room for what is computed from a setting.
MAX_INT, MIN_FLOAT, MAX_FLOAT = 2**31 - 1, 1e-30, 1e30
MAX_SEED = 2**32 - 1  # the largest seed of NumPy and of `jax.random.key`

PositiveInt = Annotated[int, Range(1, MAX_INT)]
NonNegativeInt = Annotated[int, Range(0, MAX_INT)]
PositiveFloat = Annotated[float, Range(MIN_FLOAT, MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Range(0, MAX_FLOAT)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(MIN_FLOAT, 1)]
Seed = Annotated[int, Range(0, MAX_SEED)]
Temperature = Annotated[float, Range(0, 1e3)]
Text = Annotated[str, NotEmpty()]
_CONSTRAINTS = (Range, NotEmpty, Distinct)
# The names of the configs of a mapping: parts of dotted names, of files and of metrics.
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NAME_RULE = "expected a name of letters, digits, '_' and '-'"


class Sections[Section](dict[str, Section]):
    """Configs by name, which are not changed after they are made, so that a config that holds them can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        """Returns a hash of the names and configs."""
        return hash(tuple(self.items()))


@dataclass(frozen=True)
class NoEffect:
    """A declaration that fields have no effect with some value of another field of the same config.

    Attributes:
        fields: Dotted names of the fields, or of sections of them, within the config that declares this.
        because: The dotted name of the other field.
        when: Whether a config of the class has a value of that field with which the others have no effect.
        why: What is done instead: a clause that ends the message.
    """

    fields: tuple[str, ...]
    because: str
    when: Callable[[Any], bool]
    why: str


class Config:
    """A frozen dataclass with checked fields that converts to and from JSON-safe dictionaries.

    Subclasses are decorated with `@dataclass(frozen=True, kw_only=True)`. One that checks combinations of fields calls
    `super().__post_init__()` first. Every field of a subclass states its type; numbers state their `Range`.

    Attributes:
        no_effect: The fields of the class that have no effect with some value of another one (`check_effects`).

    Raises:
        ConfigError: A field has a value of another type, or one outside its choices or its range.
    """

    no_effect: ClassVar[tuple[NoEffect, ...]] = ()

    def __post_init__(self) -> None:
        """Checks every field against its annotation, and puts the home folder in place of `~` in paths."""
        for name, hint in field_types(type(self)).items():
            value, where = getattr(self, name), f"{type(self).__name__}.{name}"
            check_value(hint, value, where)
            whole = expand_paths(hint, value, where)
            if whole != value:
                object.__setattr__(self, name, whole)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that JSON can hold: nested configs are dictionaries, tuples are lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]  # every subclass is a dataclass

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | None = None) -> Self:
        """Builds the config from what `to_dict` returns, or from a part of it; absent fields keep their defaults.

        Args:
            values: Field names and JSON-safe values.
            where: What the error messages call this config, e.g. "config.optimizer"; by default the class's name.

        Returns:
            The config.

        Raises:
            ConfigError: A field is unknown (the message names the nearest and all known ones), has a wrong value, or
                has no default and is absent.
        """
        where = where or cls.__name__
        hints = field_types(cls)
        check_names(values, hints, where)
        parsed = {}
        for name, value in values.items():
            parsed[name] = cls.parse_field(name, value, f"{where}.{name}")
            check_value(hints[name], parsed[name], f"{where}.{name}")
        absent = [name for name in _required(cls) if name not in parsed]
        check(not absent, f"{where} lacks {', '.join(absent)}: a field without a default has to be given")
        try:
            return cls(**parsed)
        except ConfigError as error:
            # The class does not know where its values stand.
            own = f"{cls.__name__}."
            if where == cls.__name__ or not str(error).startswith(own):
                raise
            raise ConfigError(str(error).replace(own, f"{where}.")) from error

    @classmethod
    def parse_field(cls, name: str, value: Any, where: str) -> Any:
        """Returns the value of a field, given its JSON form: lists become tuples, dictionaries nested configs.

        Args:
            name: Name of the field.
            value: Its JSON form.
            where: What the error messages call the field.

        Raises:
            ConfigError: A nested config cannot be built.
        """
        return _parse(field_types(cls)[name], value, where)


# Annotations are evaluated once for each class. (mypy holds that classes cannot be arguments of functools.cache.)
_field_types: dict[type, dict[str, Any]] = {}


def field_types(cls: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields, `Annotated` metadata included, in the order of declaration."""
    if cls not in _field_types:
        hints = typing.get_type_hints(cls, include_extras=True)
        _field_types[cls] = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return _field_types[cls]


def _required(cls: type) -> list[str]:
    """The names of the fields that have no default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def check_names(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Checks that names are known.

    Args:
        values: The names.
        known: The known names.
        where: What has these fields, for the message.

    Raises:
        ConfigError: A name is not known; the message gives the nearest known name and all of them.
    """
    known = list(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{where} has no field {name!r}; {hint}it has {', '.join(sorted(known))}")


def check_value(hint: Any, value: Any, where: str) -> None:
    """Checks a value against an annotation.

    Args:
        hint: int, float, bool, str, a `Config` class, a `Literal`, `Annotated[..., Range]`, a tuple, a mapping, or
            a union of these.
        value: The value of the field.
        where: The field's name in the message.

    Raises:
        ConfigError: The value is not one of the annotation's; the message says what is expected.
    """
    if not _accepts(hint, value):
        raise ConfigError(f"{where} = {shown(value)}: expected {describe(hint)}")


def check(condition: bool, message: str) -> None:
    """Checks a condition.

    Raises:
        ConfigError: The condition does not hold; the error has this message.
    """
    if not condition:
        raise ConfigError(message)


def check_increasing(where: str, values: tuple[float, ...]) -> None:
    """Raises ConfigError unless there is at least one value and they are strictly increasing."""
    check(
        len(values) > 0 and list(values) == sorted(set(values)),
        f"{where} = {values}: expected at least one number, strictly increasing",
    )


def describe(hint: Any) -> str:
    """Returns the values that an annotation accepts, in words for an error message."""
    hint = _plain_hint(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if (mark := path_mark(hint)) is not None:
            return str(mark)
        constraints = " and ".join(str(extra) for extra in arguments[1:] if isinstance(extra, _CONSTRAINTS))
        return f"{describe(arguments[0])} {constraints}".rstrip()
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing (None)" if part is type(None) else describe(part) for part in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a sequence, each element {describe(arguments[0])}"
        return "(" + ", ".join(describe(part) for part in arguments) + ")"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping of names to values, each {describe(arguments[1]) if arguments else describe(Any)}"
    names = {int: "an integer", float: "a finite number", bool: "True or False", str: "a text", Any: "any value"}
    return names.get(hint, f"a value of the type {getattr(hint, '__name__', hint)}")


def expand_paths(hint: Any, value: Any, where: str) -> Any:
    """Returns a value whose texts that are declared as paths are what `check_path_text` makes of them.

    Args:
        hint: The annotation of the value.
        value: A value that the annotation accepts.
        where: The field's name in the message.

    Raises:
        ConfigError: A path is empty or cannot be understood.
    """
    hint = _plain_hint(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        mark = path_mark(hint)
        if mark is not None and isinstance(value, str):
            return check_path_text(value, where, mark)
        return expand_paths(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        part = next((part for part in arguments if _accepts(part, value)), None)
        return value if part is None else expand_paths(part, value, where)
    if origin is tuple and isinstance(value, tuple):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        parts = [arguments[0]] * len(value) if repeated else arguments
        return tuple(expand_paths(part, one, where) for part, one in zip(parts, value, strict=True))
    return value


def element_config(hint: Any) -> type[Config] | None:
    """Returns the class of the configs that a mapping by name holds, or None for any other annotation."""
    hint = _plain_hint(hint)
    arguments = typing.get_args(hint)
    if not _is_mapping(hint) or len(arguments) != 2:
        return None
    return arguments[1] if isinstance(arguments[1], type) and issubclass(arguments[1], Config) else None


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def path_mark(hint: Any) -> PathMark | None:
    """Returns the mark of an annotation that declares a path, or None for any other annotation."""
    hint = _plain_hint(hint)
    if typing.get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in typing.get_args(hint)[1:] if isinstance(extra, PathMark)), None)


def path_values(config: Config, where: str = "config") -> Iterator[tuple[str, str]]:
    """Yields the paths that a config and its sections hold, each with the dotted name of its field."""
    for name in field_types(type(config)):
        yield from field_paths(config, name, where)


def field_paths(config: Config, name: str, where: str = "config") -> Iterator[tuple[str, str]]:
    """Yields the paths that one field of a config holds; see `path_values`."""
    yield from _path_values(field_types(type(config))[name], getattr(config, name), f"{where}.{name}")


def _path_values(hint: Any, value: Any, where: str) -> Iterator[tuple[str, str]]:
    hint = _plain_hint(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Config):
        yield from path_values(value, where)
    elif (mark := path_mark(hint)) is not None and isinstance(value, str):
        for part in value.split(",") if mark.several else [value]:
            if part.strip():
                yield where, part.strip()
    elif origin in (Union, types.UnionType):
        chosen = next((one for one in arguments if _accepts(one, value)), None)
        yield from () if chosen is None else _path_values(chosen, value, where)
    elif element_config(hint) is not None and isinstance(value, Mapping):
        for name, one in value.items():
            yield from path_values(one, f"{where}.{name}")
    elif origin is tuple and isinstance(value, tuple):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        for part, one in zip([arguments[0]] * len(value) if repeated else arguments, value, strict=True):
            yield from _path_values(part, one, where)


def _plain_hint(hint: Any) -> Any:
    """An annotation in place of the alias that a `type` statement gave it."""
    return hint.__value__ if isinstance(hint, typing.TypeAliasType) else hint


def _accepts(hint: Any, value: Any) -> bool:
    """Returns whether an annotation accepts a value."""
    hint = _plain_hint(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _accepts(arguments[0], value) and all(
            value in extra for extra in arguments[1:] if isinstance(extra, _CONSTRAINTS)
        )
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_accepts(part, value) for part in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_accepts(arguments[0], part) for part in value)
        return len(value) == len(arguments) and all(map(_accepts, arguments, value))
    if origin is not None and issubclass(origin, Mapping):
        element = arguments[1] if arguments else Any
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _accepts(element, part) for key, part in value.items()
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, hint)


def _finite(value: float) -> bool:
    """Whether a number is finite, and an integer not larger than every float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _parse(hint: Any, value: Any, where: str) -> Any:
    """The value of an annotation from its JSON form, as far as it fits; `check_value` judges it afterwards."""
    hint = _plain_hint(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _parse(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        accepted = [part for part in arguments if part is not type(None)]
        return value if value is None or len(accepted) != 1 else _parse(accepted[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        if not repeated and len(value) != len(arguments):
            return tuple(value)
        parts = [arguments[0]] * len(value) if repeated else arguments
        return tuple(_parse(part, one, f"{where}[{i}]") for i, (part, one) in enumerate(zip(parts, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if _finite(value) else value
    if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
        return hint.from_dict(value, where)
    element = element_config(hint)
    if element is not None and isinstance(value, Mapping):
        for name in value:
            check(isinstance(name, str) and _NAME.fullmatch(name) is not None, f"{where}: {shown(name)}: {_NAME_RULE}")
        return Sections({name: _parse(element, one, f"{where}.{name}") for name, one in value.items()})
    return value


def _plain(value: Any) -> Any:
    """The JSON form of a value."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
