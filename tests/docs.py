"""Reads the code blocks of the documentation pages, so that tests can run them, and checks their commands."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from tools.code_blocks import console_lines, read_blocks
from vr_jax.cli.flags import Command, Group, parse
from vr_jax.cli.main import COMMANDS
from vr_jax.settings import load_config

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The text of every fenced code block of a page in a language, such as "python" or "console"."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [block.text for block in read_blocks(text) if block.language == language]


def commands(page: str) -> list[list[str]]:
    """The words of every `vr-jax` command of a page, without `vr-jax`."""
    lines = (words for block in blocks(page, "console") for words in console_lines(block))
    return [words[words.index("vr-jax") + 1 :] for words in lines if "vr-jax" in words]


def check_command(words: Sequence[str]) -> None:
    """Fails unless a command exists and takes its flags, and its config file takes the overrides."""
    name, *rest = words
    assert name in COMMANDS, f"no command {name!r}"
    command: Command | Group = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
    if isinstance(command, Group):
        if rest[0] in command.actions:
            command, rest = command.actions[rest[0]], rest[1:]
        else:
            assert command.default is not None, f"{name} has no action {rest[0]!r}"
            command = command.default
    flags = parse(command.flags, rest)
    if config := getattr(flags, "config", None):
        load_config(config, flags.overrides)
