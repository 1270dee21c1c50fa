"""Writes down what a run is: its settings, versions, devices and parameters.

<workdir>/run.json         a list with an entry for every start of the run; a continuation adds one
<workdir>/parameters.txt   the table of parameters; a continuation with another table, which another mesh makes,
                           writes parameters.<number of the start>.txt
<workdir>/first_batch.html the first batch of the last start (`vr_jax.data.batch_page`)
"""

from __future__ import annotations

import json
import math
import pathlib
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

import jax

from vr_jax import distributed
from vr_jax.data.fingerprint import change
from vr_jax.errors import UserError
from vr_jax.settings import TrainConfig
from vr_jax.storage import Path, check_apart, check_target, file_errors, in_order, write_json, write_text
from vr_jax.training.checkpoint import DAMAGED_FOLDER, FOLDER
from vr_jax.training.goodput import GOODPUT_FILE
from vr_jax.training.program import TrainProgram
from vr_jax.training.state import TrainState
from vr_jax.training.trackers import METRICS_FILE, TENSORBOARD_FOLDER

RUN_FILE, PARAMETERS_FILE, FIRST_BATCH_FILE = "run.json", "parameters.txt", "first_batch.html"
EXPORT_FOLDER, ADAPTER_FOLDER, PROFILE_FOLDER = "model", "adapter", "profile"
VALIDATION_FOLDER = "validation"  # for replies
# The same of the best checkpoint, which `--export_best` writes.
BEST_EXPORT_FOLDER, BEST_ADAPTER_FOLDER = "model_best", "adapter_best"
# What a run writes to its folder, and would replace or continue.
WRITTEN = (
    *(FOLDER, DAMAGED_FOLDER, METRICS_FILE, GOODPUT_FILE, TENSORBOARD_FOLDER, "wandb", VALIDATION_FOLDER),
    *(EXPORT_FOLDER, ADAPTER_FOLDER, BEST_EXPORT_FOLDER, BEST_ADAPTER_FOLDER, PROFILE_FOLDER),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def claim(workdir: Path, sources: Sequence[Path]) -> str:
    """Makes sure that a run replaces nothing in its folder but what it has written itself.

    Args:
        workdir: Folder of the run, which this process holds.
        sources: Files and folders that the run reads.

    Returns:
        The identity of the run: that of its record, or a new one.

    Raises:
        UserError: The folder holds what another program or another run has written, or the exported model would replace
            one of the sources.
    """
    starts = read_run_record(workdir)
    if not starts:
        with file_errors(f"{workdir} cannot be read"):
            foreign = [name for name in WRITTEN if _holds_something(workdir / name)]
        if foreign:
            raise UserError(
                f"{workdir} holds {', '.join(foreign)} but no {RUN_FILE}, so no run has written it; choose another "
                "--workdir, or move it away"
            )
    run = str(starts[0].get("run", "")) if starts else secrets.token_hex(8)
    check_apart(workdir / EXPORT_FOLDER, sources, where="the exported model", source="config.init_from")
    for folder in (EXPORT_FOLDER, ADAPTER_FOLDER, BEST_EXPORT_FOLDER, BEST_ADAPTER_FOLDER):
        check_target(workdir / folder, overwrite=True, owner=run)
    return run


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def check_data(workdir: Path, config: TrainConfig, data: Mapping[str, Any] | None, step: int) -> None:
    """Makes sure that a run continues on the data that it began with.

    Raises:
        UserError: Files or the number of records changed since the last start, and `config.data.allow_changed` is not
            set.
    """
    starts = read_run_record(workdir)
    before = starts[-1].get("data") if starts else None
    if data is None or before is None or config.data.allow_changed:
        return
    if (found := change(before, data)) is not None:
        raise UserError(
            f"the training data changed since the run was started last ({found}), so that it would not continue from "
            f"step {step} as it began; put the files back, start a new run, or set config.data.allow_changed=True"
        )


def write_run_record(
    workdir: Path,
    config: TrainConfig,
    program: TrainProgram,
    *,
    step: int,
    total_steps: int,
    rules: Mapping[str, str] = MappingProxyType({}),
    run: str = "",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Adds this start to the record of the run. All processes call it; the first one writes.

    Args:
        workdir: Folder of the run.
        config: The settings of the run.
        program: The computation of the run.
        step: Number of updates done before this start.
        total_steps: Number of updates of the run.
        rules: `mesh_rule`, why the mesh is as it is, and `batch`, a sentence that tells the samples of an update and
            the rule for the learning rate.
        run: The identity of the run (`claim`).
        data: What tells the data apart (`vr_jax.data.fingerprint`).

    Raises:
        UserError: The files cannot be read or written.
    """

    def write() -> None:
        if not distributed.is_first():
            return
        starts = read_run_record(workdir)
        table = parameter_table(program.abstract)
        entry = {
            "run": run,
            "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "first_step": step + 1,
            "total_steps": total_steps,
            **rules,
            "config": config.to_dict(),
            "versions": versions(),
            "git": git_commit(),
            "devices": f"{jax.device_count()} x {program.mesh.devices.flat[0].device_kind}",
            "processes": distributed.process_count(),
            "mesh": dict(program.mesh.shape),
            "parameters": _write_table(workdir, table, len(starts) + 1),
            "data": data,
        }
        write_json(workdir / RUN_FILE, [*starts, entry])

    distributed.together(write)


def read_run_record(workdir: Path) -> list[dict[str, Any]]:
    """Returns the starts of a run so far, the first one first.

    Raises:
        UserError: The file is not the record of a run.
    """
    path = workdir / RUN_FILE
    with file_errors(f"{path} cannot be read"):
        if not path.exists():
            return []
    try:
        with file_errors(f"{path} cannot be read"):
            starts = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); move it away to continue the run") from None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UserError(f"{path} is no list of objects, one for each start of a run; move it away to continue the run")
    return starts


def run_facts(workdir: Path) -> dict[str, str]:
    """Returns what the record says of the last start of a run, as texts by their titles.

    Raises:
        UserError: The files cannot be read.
    """
    last = read_run_record(workdir)[-1]
    path = workdir / last["parameters"]
    with file_errors(f"{path} cannot be read"):
        table = path.read_text()
    mesh = " x ".join(f"{name} {size}" for name, size in last["mesh"].items())
    around = {
        "devices": last["devices"],
        "processes": last["processes"],
        "mesh": mesh,
        "updates": f"{last['first_step']} to {last['total_steps']}",
        "git": last["git"] or "not a checkout",
        **last["versions"],
    }
    return {
        "Settings": "\n".join(f"config.{name} = {value!r}" for name, value in flat_settings(last["config"]).items()),
        "Parameters": table,
        "Devices and versions": "\n".join(f"{name}: {value}" for name, value in around.items()),
    }


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted name; those of an entry of a list, as `data.sources` is one, by its number.

    Args:
        settings: Nested dictionaries, as `TrainConfig.to_dict` returns them.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(name, value)
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {f"{name}.{below}": one for below, one in flat_settings(value).items()}
    if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        entries = (_flat(f"{name}[{number}]", entry) for number, entry in enumerate(value))
        return {key: one for entry in entries for key, one in entry.items()}
    return {name: value}


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that its results depend on."""
    found = {"python": platform.python_version(), "vr_jax": metadata.version("vr-jax")}
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    return found


def git_commit() -> str | None:
    """Returns the commit of the checkout that the package runs from, or None for an installed package.

    Uncommitted changes are marked by "+changes".
    """
    checkout = pathlib.Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):  # no git, or not its owner
        return None


def _git(checkout: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


def parameter_table(abstract: TrainState) -> str:
    """Returns a table with a line for each parameter: path, shape, type, sharding, trained or frozen."""
    rows = [("path", "shape", "type", "sharding", "")]
    for kind, params in (("trained", abstract.params), ("frozen", abstract.frozen)):
        for path, leaf in params.items():
            rows.append((path, " x ".join(map(str, leaf.shape)), str(leaf.dtype), _axes(leaf.sharding), kind))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sizes = [sum(math.prod(leaf.shape) for leaf in part.values()) for part in (abstract.params, abstract.frozen)]
    return "\n".join([*lines, "", f"{sizes[0]} trained, {sizes[1]} frozen, {sum(sizes)} in all", ""])


def _axes(sharding: Any) -> str:
    """The mesh axes of each axis of a parameter, e.g. "fsdp, tensor"."""
    parts = ["-" if part is None else "*".join(part) if isinstance(part, tuple) else part for part in sharding.spec]
    return ", ".join(parts) or "-"


def _write_table(workdir: Path, table: str, start: int) -> str:
    """Writes the table of parameters unless it is that of an earlier start; returns the name of its file."""
    earlier = in_order(workdir.glob("parameters*.txt"))
    for file in earlier:
        if file.read_text() == table:
            return file.name
    name = PARAMETERS_FILE if not earlier else f"parameters.{start}.txt"
    write_text(workdir / name, table)
    return name
