"""Runs the commands of `vr-jax` in the process of a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vr_jax.cli.main import main


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Command-line arguments for flags by name; None leaves a flag out and True sets it without a value."""
    given = {name: value for name, value in flags.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def run(command: str, *positional: Any, **flags: Any) -> int:
    """Runs `vr-jax COMMAND` with positional arguments and flags and returns its exit status."""
    return main([*command.split(), *map(str, positional), *arguments(flags)])
