"""Recipes with overrides as train.py takes them, and the flags that would make them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vr_jax.plan.errors import PlanError
from vr_jax.settings.config_files import load_recipe

PREFIX = "--config."


def recipe_of(spec: str, overrides: Sequence[str]) -> ConfigDict:
    """The recipe of FILE[:VARIANT] with `--config.field=value` applied.

    Raises RecipeError, and PlanError for an override of a field that does not exist or has another type."""
    load_recipe(spec)  # its messages are the better ones
    values = flags.FlagValues()
    arguments = ["plan", f"--config={spec}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise PlanError(f"{' '.join(overrides)}: {reason}") from error
    return holder.value


def sets(overrides: Sequence[str], field: str) -> bool:
    """Whether `field`, e.g. "batch.rows", is among the overrides."""
    return any(argument.split("=", 1)[0] == f"{PREFIX}{field}" for argument in overrides)


def flags_of(settings: dict[str, Any]) -> str:
    """{"batch.rows": 256} -> "--config.batch.rows=256"."""
    return " ".join(f"{PREFIX}{field}={value}" for field, value in settings.items())
