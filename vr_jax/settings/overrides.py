"""Changes of single settings by dotted name, as values or as the texts of a command line."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import get_annotations
from typing import Annotated, Any, Literal, Union

from vr_jax.errors import ConfigError
from vr_jax.fields import Config, check, check_names, check_value, describe, element_config, field_types, path_mark
from vr_jax.model import registry
from vr_jax.path_text import NOT_SET, check_path_text


@dataclass(frozen=True)
class Text:
    """A value as it stands on the command line; the type of its field says how it is read."""

    text: str


def split_overrides(overrides: Iterable[str]) -> list[tuple[str, Text]]:
    """Splits texts such as "optimizer.lr=1e-4" into the name of a field and the text of its value.

    Raises:
        ConfigError: A text has no "=".
    """
    changes = []
    for override in overrides:
        name, equals, text = override.partition("=")
        check(bool(equals), f"{override!r}: expected FIELD=VALUE, e.g. optimizer.lr=1e-4")
        changes.append((name, Text(text)))
    return changes


def change_fields(
    config_class: type, values: Mapping[str, Any], changes: Iterable[tuple[str, Any]], where: str = "config"
) -> dict[str, Any]:
    """Returns the dictionary of a config with some fields changed; the result is not checked as a whole.

    Changes that choose a method (`model.projector.name`, or None for one that is switched off) are made first, so that
    the method's own fields can be set in any order. A method that is chosen has its defaults; a field that all methods
    of its kind share keeps its value, unless the method declares a default of its own.

    Args:
        config_class: The class of the config.
        values: All its fields, as `to_dict` returns them.
        changes: Pairs of a dotted name and a value or `Text`. Of several for one field the last counts.
        where: What messages call the config.

    Raises:
        ConfigError: A name is unknown, or a text is none of its field's type.
    """
    result = copy.deepcopy(dict(values))
    changes = list(changes)
    choices = [change for change in changes if _chooses_method(config_class, *change)]
    for name, value in choices:
        section = name.removesuffix(".name")
        place = _find(config_class, result, section, where)
        chosen = _read(place.hint if name == section else str, value, f"{where}.{name}")
        place.container[place.name] = None if chosen is None else _defaults(place, chosen)
    for name, value in changes:
        if (name, value) not in choices:
            place = _find(config_class, result, name, where)
            place.container[place.name] = _read(place.hint, value, place.where, place.container.get(place.name))
    return result


@dataclass(frozen=True)
class _Place:
    """Where a field stands: the dictionary that holds it, its name there, its annotation, its full dotted name."""

    container: dict[str, Any]
    name: str
    hint: Any
    where: str


def _find(config_class: type, values: dict[str, Any], path: str, where: str) -> _Place:
    """Follows a dotted name through the sections; raises ConfigError where it leads nowhere."""
    at, hint, shown = values, typing.cast(Any, config_class), where
    *sections, last = path.split(".")
    for part in sections:
        hint = _field_hint(hint, at, part, shown)
        shown = f"{shown}.{part}"
        if _section(hint) is None and not _is_mapping(hint):
            raise ConfigError(f"{shown} is {describe(hint)} and has no fields")
        if part not in at:  # A name that is new to a mapping of sections begins one.
            at[part] = {}
        if at[part] is None:
            kind = _method_kind(hint)
            names = f" with {shown}.name=NAME, one of {', '.join(registry.names(kind))}" if kind else ""
            raise ConfigError(f"{shown} is None (switched off); choose one first{names}")
        at = at[part]
    return _Place(at, last, _field_hint(hint, at, last, shown), f"{shown}.{last}")


def _field_hint(hint: Any, values: Mapping[str, Any], name: str, where: str) -> Any:
    """The annotation of a field of the section that `hint` annotates and `values` holds."""
    section, kind = _section(hint), _method_kind(hint)
    if section is None:
        return element_config(hint) or Any
    hints = field_types(section)
    if kind is not None:
        hints = {"name": str, **field_types(registry.method(kind, values.get("name"), where))}
    check_names([name], hints, where)
    return hints[name]


def _chooses_method(config_class: type, path: str, value: Any) -> bool:
    """Whether a change names a method, or switches one off."""
    parts = path.split(".")
    if parts[-1] == "name":
        parts.pop()
    elif not (value is None or (isinstance(value, Text) and value.text.strip() == "None")):
        return False
    hint: Any = config_class
    for part in parts:
        section = _section(hint)
        if section is None or part not in field_types(section):
            return False
        hint = field_types(section)[part]
    return _method_kind(hint) is not None


def _defaults(place: _Place, name: Any) -> dict[str, Any]:
    """The defaults of a method, with the values of the shared fields that it declares no default for."""
    base, kind = _section(place.hint), _method_kind(place.hint)
    assert base is not None
    assert kind is not None
    config_class: type[Config] = registry.method(kind, name, place.where)
    before = place.container[place.name] or {}
    if before.get("name") == name:
        return before
    own = get_annotations(config_class)
    kept = {key: before[key] for key in field_types(base) if key in before and key not in own}
    return config_class.from_dict(kept, place.where).to_dict()


def _method_kind(hint: Any) -> str | None:
    """The kind of the methods, e.g. "projector", whose base an annotation names."""
    section = _section(hint)
    return section.kind if section is not None and issubclass(section, registry.MethodConfig) else None


def _section(hint: Any) -> type | None:
    """The dataclass that an annotation names, alone or beside None."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _section(parts[0]) if len(parts) == 1 else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _element_section(hint: Any) -> type | None:
    """The dataclass of the elements of a sequence of sections; the whole config checks these elements."""
    return _section(typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else None


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _read(hint: Any, value: Any, where: str, present: Any = None) -> Any:
    """A value as it is, or the one that a text stands for."""
    if not isinstance(value, Text):
        return value
    if hint is Any and isinstance(present, int | float | str):
        hint = type(present)
    parsed = parse_text(hint, value.text, where)
    sections = (_section, _element_section, element_config)
    if hint is not Any and all(section(hint) is None for section in sections):
        check_value(hint, parsed, where)
    return parsed


def parse_text(hint: Any, text: str, where: str) -> Any:
    """Reads the text of a value as the type of its field says; ranges are not checked.

    Args:
        hint: The annotation of the field.
        text: For a sequence a Python literal, or elements separated by commas; "None" for nothing.
        where: The name of the field in messages.

    Raises:
        ConfigError: The text is none of that type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (mark := path_mark(hint)) is not None:
        if mark.optional and text.strip() == NOT_SET:
            return ""
        check(bool(text.strip()) or not mark.optional, f"{where} is empty; give {mark}, or {NOT_SET} for none")
        return check_path_text(text, where, dataclasses.replace(mark, optional=False))
    if origin is Annotated:
        return parse_text(arguments[0], text, where)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text.strip() == "None":
            return None
        accepted = [part for part in arguments if part is not type(None)]
        return parse_text(accepted[0], text, where)
    wrong = ConfigError(f"{where} = {text!r}: expected {describe(hint)}")
    if origin is Literal:
        found = [choice for choice in arguments if str(choice) == text]
        if not found:
            raise wrong
        return found[0]
    if hint is str:
        return text
    if hint is bool:
        spelled = {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())
        if spelled is None:
            raise wrong
        return spelled
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise wrong from None
    if _section(hint) is not None:
        raise ConfigError(f"{where} = {text!r}: this is a section; set its fields, e.g. --{where}.FIELD=VALUE")
    if origin is tuple:
        return _parse_tuple(hint, arguments, text, where)
    literal = _literal(text)
    if _is_mapping(hint) and not isinstance(literal, dict):
        raise wrong
    return literal


def _parse_tuple(hint: Any, arguments: tuple[Any, ...], text: str, where: str) -> tuple[Any, ...]:
    """Reads `(1, 4)`, `[1, 4]`, `1,4`, `4` or `decoder.*,projector.*`."""
    stripped = text.strip()
    if (section := _element_section(hint)) is not None:
        value = _literal(stripped)
        if not isinstance(value, tuple | list) or not all(isinstance(one, dict) for one in value):
            fields = ", ".join(f"'{name}': ..." for name in list(field_types(section))[:2])
            raise ConfigError(f'{where} = {text!r}: expected a list such as "[{{{fields}}}, ...]"')
        return tuple(value)
    if stripped[:1] in ("(", "["):
        value = _literal(stripped)
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where} = {text!r}: expected {describe(hint)}")
        return _tuples(value)
    parts = [part.strip() for part in stripped.removesuffix(",").split(",")] if stripped else []
    if "" in parts:
        raise ConfigError(f"{where} = {text!r}: an element between the commas is empty; expected {describe(hint)}")
    return tuple(parse_text(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(parts))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, tuple | list) else value


def _literal(text: str) -> Any:
    """The Python literal, or the list or object in JSON, that a text is; or the text itself."""
    for read in (ast.literal_eval, json.loads) if text.lstrip()[:1] in ("[", "{") else (ast.literal_eval,):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
