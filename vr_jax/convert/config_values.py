"""Reads values of config.json with the defaults of transformers' classes, and builds our configs of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import Config, shown
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

MOST_LAYERS, LARGEST = 10_000, 2**20  # a damaged number shall not fill the memory


def with_defaults(config_class: Any, values: Mapping[str, Any], names: Iterable[str], file: PathLike) -> Any:
    """Returns a config object of transformers, which fills in the fields that a config.json leaves out.

    Args:
        config_class: The class of transformers.
        values: The fields of the config.json.
        names: The fields that are read.
        file: Its path, for messages.

    Raises:
        UserError: A number is too large, or the class does not accept the values.
    """
    from huggingface_hub.errors import StrictDataclassError

    given = {name: values[name] for name in names if name in values}
    for name in ("num_hidden_layers", *(name for name, value in given.items() if isinstance(value, int))):
        largest = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if isinstance(given.get(name), int) and given[name] > largest:
            raise UserError(f"{file}: {name} = {shown(given[name])}: expected at most {largest}")
    try:
        return config_class(**given)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no valid {config_class.__name__}: {reason}") from error


def built[C: Config](config_class: type[C], values: Mapping[str, Any], where: str) -> C:
    """Returns a config of ours.

    Raises:
        UserError: A value is not valid; the message names the file.
    """
    try:
        return config_class(**values)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def section(values: Mapping[str, Any], name: str, file: PathLike) -> Mapping[str, Any]:
    """Returns the object that a field holds; an absent one has no fields.

    Raises:
        UserError: The field holds something else.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{file}: {name} = {shown(value)}: expected an object")
    return value or {}


def known(values: Mapping[str, Any], table: FieldTable) -> dict[str, Any]:
    """Returns the fields that a table reads, of a config that transformers completed."""
    return {name: value for name, value in values.items() if name in table.honoured}


def listed(value: Any, where: str) -> list[Any]:
    """Returns a list that may be absent.

    Raises:
        UserError: The value is none.
    """
    if value is not None and not isinstance(value, list | tuple):
        raise UserError(f"{where} = {shown(value)}: expected a list")
    return list(value or ())
