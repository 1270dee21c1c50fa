"""LLaVA's data files in YAML, which list JSON files and how much of each is taken.

    datasets:
      - json_path: a.json
        sampling_strategy: "first:10%"

Source: `LLaVA-NeXT@df17966:llava/train/train.py`, `LazySupervisedDataset.__init__`.
"""

from __future__ import annotations

from typing import Any

import yaml

from vr_jax.data.skips import one_line
from vr_jax.errors import UserError
from vr_jax.storage import Path, file_errors

SUFFIXES = (".yaml", ".yml")
FIELDS = ("json_path", "sampling_strategy")


def read_llava_yaml(path: Path) -> list[tuple[str, str]]:
    """Reads the list of a file.

    Args:
        path: The file.

    Returns:
        The path of each JSON file, relative to the working directory as in LLaVA, and its sampling strategy.

    Raises:
        UserError: The file cannot be read, or has a field that is not known; the message names it.
    """
    with file_errors(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({one_line(str(error), 200)}); repair the file.") from error
    if not isinstance(content, dict) or set(content) != {"datasets"}:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else one_line(repr(content), 80)
        raise UserError(f"{path}: found {found or 'nothing'}, expected the field 'datasets' alone, with a list.")
    datasets = content["datasets"]
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{path}: datasets = {one_line(repr(datasets), 80)}: expected a list of one or more datasets.")
    return [_entry(one, f"{path}: datasets[{number}]") for number, one in enumerate(datasets)]


def _entry(one: Any, where: str) -> tuple[str, str]:
    """Returns path and sampling strategy of an entry of the list."""
    if not isinstance(one, dict):
        raise UserError(f"{where} = {one_line(repr(one), 80)}: expected the fields {' and '.join(FIELDS)}.")
    unknown = [str(name) for name in one if name not in FIELDS]
    if unknown:
        raise UserError(
            f"{where} has the field {unknown[0]!r}; known are {' and '.join(FIELDS)}. Leave it out, or list the "
            "sources in config.data.sources, which have more fields."
        )
    for name, value in {"json_path": None, **one}.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}.{name} = {value!r}: expected a text.")
    return one["json_path"], one.get("sampling_strategy", "all")
