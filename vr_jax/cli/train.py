"""Behind train.py: flags, logging, several processes, and one clear line with a documented exit code for mistakes."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict

from vr_jax.compilation import use_compilation_cache
from vr_jax.data.records import SourceError
from vr_jax.data.skips import TooManySkips
from vr_jax.model.config import ConfigError
from vr_jax.model_directory import ModelDirectoryError
from vr_jax.sharding import ShardingError
from vr_jax.training import inputs, stopping
from vr_jax.training.checkpoint import CheckpointError
from vr_jax.training.inputs import InputError
from vr_jax.training.loop import OpenInputs, export_newest, train
from vr_jax.training.optimizer import OptimizerError
from vr_jax.training.state import TrainableError

USAGE_ERRORS = (
    CheckpointError,
    ConfigError,
    InputError,
    ModelDirectoryError,
    OptimizerError,
    ShardingError,
    SourceError,
    TrainableError,
)
CONFIG_FLAG = "config"


def parse_flags(argv: list[str]) -> list[str]:
    """For `app.run`: what is wrong with the command line is one line, with the nearest known name."""
    path = _flag_value(argv, CONFIG_FLAG)
    if path is not None:
        file = Path(path.split(":", 1)[0])
        if not file.is_file():
            fail(stopping.EXIT_USAGE, f"--config={path}: {file} does not exist")
        try:
            recipe = flags.FLAGS[CONFIG_FLAG].parser.parse(path)
        except ValueError as error:
            fail(stopping.EXIT_USAGE, f"--config={path}: {str(error).strip().splitlines()[-1]}")
        for argument in argv[1:]:
            _check_field(argument, recipe)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(stopping.EXIT_USAGE, str(error))


def _flag_value(argv: list[str], name: str) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument.lstrip("-") == name and argument.startswith("-"):
            return following
        if argument.startswith((f"--{name}=", f"-{name}=")):
            return argument.split("=", 1)[1]
    return None


def _check_field(argument: str, recipe: ConfigDict) -> None:
    """An override of a field that the recipe does not have ends the program, naming those it has."""
    name = argument.lstrip("-").split("=", 1)[0]
    if not argument.startswith("-") or not name.startswith(f"{CONFIG_FLAG}."):
        return
    at: Any = recipe
    parts = name.split(".")[1:]
    for depth, part in enumerate(parts):
        if not isinstance(at, ConfigDict) or part not in at:
            owner = ".".join([CONFIG_FLAG, *parts[:depth]])
            known = sorted(at.keys()) if isinstance(at, ConfigDict) else []
            near = difflib.get_close_matches(part, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            fail(stopping.EXIT_USAGE, f"--{name}: {owner} has no field {part!r}; {hint}it has {', '.join(known)}")
        at = at[part]


def main(values: flags.FlagValues, config: ConfigDict | None, rest: list[str]) -> None:
    """Starts several processes' runtime and logging as the flags say, then `run`s."""
    if rest:
        fail(stopping.EXIT_USAGE, f"unexpected argument {rest[0]!r}")
    if config is None or values.workdir is None:
        missing = "--config" if config is None else "--workdir"
        fail(stopping.EXIT_USAGE, f"{missing} is missing; see docs/train.md")
    if values.coordinator:
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    elif values.distributed:
        jax.distributed.initialize()
    _start_logging()
    use_compilation_cache()
    run(config, Path(values.workdir), export_only=values.export_only)


def run(
    config: ConfigDict, workdir: Path, *, export_only: bool = False, open_inputs: OpenInputs = inputs.open_inputs
) -> None:
    """Trains or exports; what is known to go wrong ends the program with its message and exit code (docs/train.md)."""
    try:
        if export_only:
            export_newest(config, workdir)
        else:
            train(config, workdir, open_inputs=open_inputs)
    except USAGE_ERRORS as error:
        fail(stopping.EXIT_USAGE, str(error))
    except stopping.NonFiniteLoss as error:
        fail(stopping.EXIT_NOT_FINITE, str(error))
    except TooManySkips as error:
        fail(stopping.EXIT_SKIPPED, str(error), alone=True)
    except stopping.Preempted as stop:
        fail(stopping.EXIT_PREEMPTED, str(stop))


def _start_logging() -> None:
    """Our own messages, of the first process only, and everybody's warnings."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", force=True)
    for name, level in (("absl", logging.ERROR), ("jax", logging.WARNING)):  # Orbax and Grain narrate each save
        logging.getLogger(name).setLevel(level)
    logging.getLogger("vr_jax").setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)


def fail(code: int, message: str, *, alone: bool = False) -> NoReturn:
    """alone: this process only; the others are blocked in a collective, and a regular exit would wait for them."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    if alone and jax.process_count() > 1:
        os._exit(code)
    sys.exit(code)
