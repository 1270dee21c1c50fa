"""Declarations of command-line flags, and the one parser and the one help text that read them.

The flags of a command are the fields of a frozen dataclass that derives from `Flags`. The annotation of a field says
its type, its choices (`Literal`) and its `Range`; `flag(...)` adds the default value and the help text. Flags that have
no effect with the value of another one are declared in `no_effect`, as in every `Config`:

    @dataclass(frozen=True, kw_only=True)
    class ChatFlags(Flags):
        checkpoint: str = flag(help="Model directory.", metavar="DIR")
        top_p: PositiveFraction = flag(1.0, "Share of the probability to sample from.")

All commands share one style: names have underscores, dashes are accepted in their place, and a value follows an equals
sign or a space. `--name` switches a bool on and `--no_name` switches it off.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from vr_jax.effects import check_effects
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import (
    MAX_FLOAT,
    MAX_INT,
    MIN_FLOAT,
    Config,
    Range,
    check_value,
    describe,
    field_types,
    path_mark,
)
from vr_jax.path_text import check_path_text

WIDTH = 100
OVERRIDE = "config."
_KEY = "flag"


class UsageError(UserError):
    """A command line that cannot be understood."""


@dataclass(frozen=True)
class FlagInfo:
    """Holds the facts about a flag that stand beside the annotation and the default value of its field.

    Attributes:
        help: Full sentences for the help text.
        names: The names on the command line, without dashes. Several names are for a field that holds (name, value)
            pairs in the order of the command line.
        metavar: The word that stands for the value in the help text.
        positional: Whether the value stands without a name.
        environment: The environment variable that holds the default value.
        overrides: Whether the field collects `--config.FIELD=VALUE` arguments.
        remainder: Whether the field takes all arguments from the first word on that is no flag.
    """

    help: str
    names: tuple[str, ...] = ()
    metavar: str = ""
    positional: bool = False
    environment: str = ""
    overrides: bool = False
    remainder: bool = False


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    name: str | tuple[str, ...] = (),
    metavar: str = "",
    positional: bool = False,
    environment: str = "",
    overrides: bool = False,
    remainder: bool = False,
) -> Any:
    """Declares a field of a `Flags` class as a flag.

    Args:
        default: The value where the flag is absent; without one, the flag must be given.
        help: Full sentences for the help text.
        name: The name on the command line where it is not the field's name. Several names are for a field that holds
            (name, value) pairs in the order of the command line.
        metavar: The word that stands for the value in the help text, e.g. "DIR".
        positional: Whether the value stands without a name.
        environment: An environment variable that holds the default value.
        overrides: Whether the field collects `--config.FIELD=VALUE` arguments as "FIELD=VALUE".
        remainder: Whether the field takes all arguments from the first word on that is no flag, flags too.

    Returns:
        A dataclass field.
    """
    names = (name,) if isinstance(name, str) else name
    info = FlagInfo(help, names, metavar, positional or remainder, environment, overrides, remainder)
    return dataclasses.field(default=default, metadata={_KEY: info})


@dataclass(frozen=True, kw_only=True)
class Flags(Config):
    """The flags of a command. Subclasses declare one field for each flag."""


@dataclass(frozen=True)
class Command[F: Flags]:
    """A command: what its flags are and what it does.

    Attributes:
        summary: One line that says what the command does.
        flags: The table of flags.
        run: Does the work and returns the exit status; None is success.
        details: Paragraphs of the help text below the summary.
        examples: Command lines for the help text.
        interrupted: The message after Ctrl-C.
        verbose: Whether messages of level INFO are shown.
    """

    summary: str
    flags: type[F]
    run: Callable[[F], int | None]
    details: str = ""
    examples: tuple[str, ...] = ()
    interrupted: str = "interrupted"
    verbose: bool = False


@dataclass(frozen=True)
class Group:
    """A command with actions, e.g. `vr-jax convert import`.

    Attributes:
        summary: One line that says what the actions are about.
        actions: The actions by name.
        default: What runs where the first argument names no action.
    """

    summary: str
    actions: Mapping[str, Command[Any]]
    default: Command[Any] | None = None


@dataclass(frozen=True)
class _Option:
    """A field of a flag table, with its annotation taken apart."""

    field: str
    info: FlagInfo
    hint: Any
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        return self.info.names or (self.field,)

    @property
    def kind(self) -> Any:
        """The type of one value."""
        return _single(self.hint)

    @property
    def repeated(self) -> bool:
        return typing.get_origin(_required(self.hint)) is tuple

    @property
    def named(self) -> bool:
        return not (self.info.positional or self.info.overrides)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


def parse[F: Flags](table: type[F], arguments: Sequence[str]) -> F:
    """Builds a flag table from command-line arguments.

    Raises:
        UsageError: A flag is unknown, is missing, or has a value of another type.
        ConfigError: A value is outside its choices or its range, or a flag has no effect with the others.
    """
    options = _options(table)
    by_name = {name: option for option in options if option.named for name in option.names}
    found: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            rest += queue
            break
        if not argument.startswith("--"):
            rest.append(argument)
            if any(option.info.remainder for option in options):
                rest += queue
                break
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith(OVERRIDE) and (option := _overrides(options)):
            value = value if equals else _following(queue, argument)
            found.setdefault(option.field, []).append(f"{name[len(OVERRIDE) :]}={value}")
            continue
        if "." in name and _overrides(options):
            raise UsageError(f"unknown flag --{name}; a field of the config is set by --{OVERRIDE}{name}=VALUE")
        option, negated = _find(name, by_name)
        if option.kind is bool:
            found[option.field] = _truth(f"--{name}", value if equals else "true") != negated
            continue
        value = value if equals else _following(queue, argument)
        parsed = _value(option, f"--{name}", value)
        if len(option.names) > 1:
            found.setdefault(option.field, []).append((name, parsed))
        elif option.repeated:
            found.setdefault(option.field, []).append(parsed)
        else:
            found[option.field] = parsed
    _positionals(options, rest, found)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    given = set(values)  # those of the environment are for all commands, also where they have no effect
    for option in options:
        if option.field not in values and (text := os.environ.get(option.info.environment or "=")):
            values[option.field] = _value(option, f"${option.info.environment}", text)
        if option.field not in values and option.required:
            help = _first_sentence(option.info.help)
            raise UsageError(f"{_label(option)} is missing: give {_usage_word(option)}. {help}")
    flags = table(**values)
    labels = {option.field: _label(option) for option in options}
    check_effects(flags, "", [option.field for option in options if option.field in given], labels.__getitem__)
    return flags


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that is not known, with the nearest known name and all of them."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name}; {hint}known: {', '.join(known)}"


def help_text(program: str, command: Command[Any] | Group) -> str:
    """The complete help of a command, at most `WIDTH` columns wide."""
    if isinstance(command, Group):
        names = command.actions.items()
        lines = [command.summary, "", f"usage: {program} ACTION [flags]", ""]
        if command.default is not None:
            lines = [help_text(program, command.default), "", "Actions:"]
        lines += _rows([(name, action.summary) for name, action in names])
        lines += ["", f"{program} ACTION --help tells the flags of an action."]
        return "\n".join(lines)
    options = _options(command.flags)
    words = [_usage_word(option) for option in options if option.info.positional or option.required]
    flags = ["[flags]"] if options else []
    last = any(option.info.remainder for option in options)
    lines = [command.summary, "", " ".join(["usage:", program, *(flags + words if last else words + flags)])]
    for paragraph in filter(None, command.details.split("\n\n")):
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), WIDTH)]
    if command.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in command.examples)]
    if options:
        lines += ["", "Flags (--name=value or --name value):"]
        lines += _rows([(_heading(option), _explanation(option)) for option in options])
    return "\n".join(lines)


def _options(table: type[Flags]) -> list[_Option]:
    hints = field_types(table)
    return [
        _Option(one.name, one.metadata[_KEY], hints[one.name], one.default)
        for one in dataclasses.fields(table)
        if _KEY in one.metadata
    ]


def _overrides(options: Iterable[_Option]) -> _Option | None:
    return next((option for option in options if option.info.overrides), None)


def _label(option: _Option) -> str:
    """Returns the name of a flag as a user writes it."""
    if option.info.positional:
        return option.field.upper()
    return f"--{OVERRIDE}FIELD" if option.info.overrides else f"--{option.names[0]}"


def _find(name: str, by_name: Mapping[str, _Option]) -> tuple[_Option, bool]:
    if name in by_name:
        return by_name[name], False
    for prefix in ("no_", "no"):
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and bare in by_name and by_name[bare].kind is bool:
            return by_name[bare], True
    raise UsageError(unknown("flag", f"--{name}", [f"--{known}" for known in by_name]))


def _following(queue: list[str], argument: str) -> str:
    if not queue or (queue[0].startswith("--") and len(queue[0]) > 2):
        raise UsageError(f"{argument} needs a value: {argument}=VALUE")
    return queue.pop(0)


def _positionals(options: Iterable[_Option], rest: list[str], found: dict[str, Any]) -> None:
    for option in options:
        if not option.info.positional or not rest:
            continue
        taken, rest = (rest, []) if option.repeated else (rest[:1], rest[1:])
        parsed = [_value(option, option.field.upper(), text) for text in taken]
        found[option.field] = parsed if option.repeated else parsed[0]
    if rest:
        paths = (option for option in options if option.named and path_mark(option.kind) is not None)
        free = next((option for option in paths if option.field not in found), None)
        hint = f"; did you mean {_label(free)}={rest[0]}?" if free is not None else ""
        raise UsageError(f"unexpected argument {rest[0]!r}; flags start with --{hint}")


def _value(option: _Option, label: str, text: str) -> Any:
    kind = option.kind
    if (mark := path_mark(kind)) is not None:
        return check_path_text(text, label, mark)
    base = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    if base is bool:
        return _truth(label, text)
    if base in (int, float):
        try:
            number = base(text)
            check_value(kind, number, label)
        except (ValueError, ConfigError):
            raise UsageError(f"{label}={text}: expected {describe(kind)}") from None
        return number
    if typing.get_origin(base) is Literal and text not in typing.get_args(base):
        raise UsageError(f"{label}={text}: expected {describe(base)}")
    if not text.strip() and option.default != "":
        raise UsageError(f"{label}= is empty: expected {_metavar(option)}; leave the flag out where there is none")
    return text


def _truth(label: str, text: str) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if text.lower() not in words:
        raise UsageError(f"{label}={text}: expected true or false")
    return words[text.lower()]


def _required(hint: Any) -> Any:
    """The annotation without `| None`."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _single(hint: Any) -> Any:
    """The annotation of one value of a flag."""
    hint = _required(hint)
    if typing.get_origin(hint) is tuple:
        part = typing.get_args(hint)[0]
        return typing.get_args(part)[1] if typing.get_origin(part) is tuple else part
    return hint


def _usage_word(option: _Option) -> str:
    if option.info.positional:
        word = option.info.metavar or option.field.upper()
        word += "..." if option.repeated else ""
        return word if option.required else f"[{word}]"
    return f"--{option.names[0]}={_metavar(option)}"


def _metavar(option: _Option) -> str:
    if option.info.metavar:
        return option.info.metavar
    kind = option.kind
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def _heading(option: _Option) -> str:
    if option.info.positional:
        return option.info.metavar or option.field.upper()
    if option.info.overrides:
        return f"--{OVERRIDE}FIELD=VALUE"
    if option.kind is bool:
        return f"--{'no_' if option.default is True else ''}{option.names[0]}"
    return ", ".join(f"--{name}={_metavar(option)}" for name in option.names)


def _explanation(option: _Option) -> str:
    notes = []
    kind = option.kind
    if typing.get_origin(kind) is Annotated:
        notes += [text for extra in typing.get_args(kind)[1:] if isinstance(extra, Range) and (text := _bounds(extra))]
    if option.required:
        notes.append("required")
    elif option.default not in (None, (), False, ""):
        notes.append(f"default {option.default}")
    if option.repeated and not option.info.overrides:
        notes.append("may be repeated")
    if option.info.environment:
        notes.append(f"environment: {option.info.environment}")
    return option.info.help + (f" ({'; '.join(notes)})" if notes else "")


def _bounds(allowed: Range) -> str:
    """The bounds of a number for the help text, without those that only keep arrays from overflowing."""
    low = dataclasses.replace(allowed, low=0, open_low=True) if allowed.low == MIN_FLOAT else allowed
    return str(dataclasses.replace(low, high=math.inf) if allowed.high in (MAX_INT, MAX_FLOAT) else low)


def _rows(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    column = min(26, max(len(left) for left, _ in rows) + 2)
    for left, right in rows:
        wrapped = textwrap.wrap(right, WIDTH - column - 2)
        first = f"  {left:<{column}}"
        if len(left) + 2 > column:
            yield f"  {left}"
            first = " " * (column + 2)
        yield (first + (wrapped[0] if wrapped else "")).rstrip()
        yield from (" " * (column + 2) + line for line in wrapped[1:])


def _first_sentence(text: str) -> str:
    sentence, stop, _ = text.partition(". ")
    return sentence + stop.strip()
