"""The files of a model directory, its format version, and its config.json."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vr_jax.errors import ConfigError, UserError
from vr_jax.model.config import VlmConfig
from vr_jax.storage import (
    Path,
    PathLike,
    as_path,
    check_complete,
    file_errors,
    in_order,
    is_complete,
    refuse_s3,
    write_json,
)

FORMAT, VERSION = "vr_jax model", 3
CONFIG_FILE, PARAMS_FOLDER = "config.json", "params"
SIDE_FILES = (  # of a tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
PIXELS = "pixels"  # the section of ImageConfig's fields beside an encoder alone
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_ADAPTER_FILE = "adapter_config.json"  # of PEFT
_WHOLE_MODEL = {"encoder", "decoder", "projector", "image"}


def copy_side_files(source: PathLike, target: PathLike) -> None:
    """Copies those of `SIDE_FILES` that exist from one folder to another.

    Raises:
        UserError: A file cannot be read or written.
    """
    for name in SIDE_FILES:
        path = as_path(source) / name
        if path.exists():
            with file_errors(f"{path} cannot be copied to {target}"):
                (as_path(target) / name).write_bytes(path.read_bytes())


def has_tokenizer(directory: PathLike) -> bool:
    """Returns whether a folder holds the files of a tokenizer."""
    return any((as_path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def write_sections(directory: PathLike, sections: Mapping[str, Any]) -> None:
    """Writes config.json with the sections of a `VlmConfig.to_dict()`, or of a part of it."""
    # transformers' AutoTokenizer takes a folder whose config.json names no model_type for one of Mistral's.
    values = {"format": FORMAT, "version": VERSION, "model_type": "vr_jax", **sections}
    write_json(as_path(directory) / CONFIG_FILE, values)


def read_sections(directory: PathLike) -> dict[str, Any]:
    """Reads config.json.

    Args:
        directory: A model directory.

    Returns:
        The sections of `VlmConfig.to_dict()`; those of a part where the directory holds only a part of a model.

    Raises:
        UserError: The directory is not a complete model directory, or one of another format version.
    """
    path = as_path(directory) / CONFIG_FILE
    complete = is_complete(directory)  # This comes first, since it also finishes the work of a killed writer.
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if not as_path(directory).exists():
            hint = _similar(directory) or (
                "; give one that `vr-jax convert import` wrote, or the folder `model` in the workdir of a run or of "
                "`vr-jax demo`"
            )
            raise UserError(f"{directory} is not a model directory: there is no such folder{hint}") from None
        raise UserError(f"{directory} is not a model directory: it has no {CONFIG_FILE}{_nearby(directory)}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(
            f"{path} is not of a vr_jax model directory; `vr-jax convert import` imports checkpoints of other formats"
        )
    version = values.pop("version", None)
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        advice = "update vr_jax" if newer else "import or train the model again, or use the vr_jax that wrote it"
        raise UserError(f"{path} has format version {version!r}, this vr_jax reads version {VERSION}; {advice}")
    if not complete:
        check_complete(directory)
    values.pop("model_type", None)
    return values


def read_config(directory: PathLike) -> VlmConfig:
    """Reads the config of a whole model.

    Raises:
        UserError: The directory is not a complete model directory, or holds only a part of a model.
    """
    sections = read_sections(directory)
    if not set(sections) >= _WHOLE_MODEL:
        raise UserError(
            f"{directory} holds only parts of a model ({', '.join(sorted(sections))}); start training from it "
            "with a config that names the other parts"
        )
    try:
        return VlmConfig.from_dict(sections)
    except ConfigError as error:
        raise ConfigError(f"{as_path(directory) / CONFIG_FILE}: {error}") from error


def _similar(directory: PathLike) -> str:
    """A hint at a model directory of nearly the same name beside one that does not exist."""
    wrong = as_path(directory)
    beside = in_order(wrong.parent.iterdir()) if wrong.parent.is_dir() else []
    names = [path.name for path in beside if (path / CONFIG_FILE).exists()]
    near = difflib.get_close_matches(wrong.name, names, 1)
    return f"; did you mean {wrong.parent / near[0]}?" if near else ""


def _nearby(directory: PathLike) -> str:
    """A hint at a model directory inside a folder that is none, or at what makes one of an adapter."""
    folder = as_path(directory)
    if (folder / _ADAPTER_FILE).exists():
        return f"; it is an adapter of PEFT, and `vr-jax convert import --from={directory} --base=DIR` merges it"
    inside = in_order(folder.iterdir()) if folder.is_dir() else []
    found = next((path for path in inside if (path / CONFIG_FILE).exists()), None)
    return f"; did you mean {found}?" if found else ""


def params_folder(directory: PathLike) -> Path:
    """The absolute path of the parameters, as Orbax wants it.

    Raises:
        UserError: It lies in a bucket of S3, which Orbax does not take.
    """
    refuse_s3(directory, "the model directory")
    return (as_path(directory) / PARAMS_FOLDER).absolute()


@contextlib.contextmanager
def orbax_errors(directory: PathLike, what: str) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore, which are ValueErrors of many lines, into a `UserError` of one line.

    Args:
        directory: The model directory.
        what: What the message says of it, e.g. "is damaged".
    """
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        text = str(error)
        code = re.search(r"os_error_code='(\d+)'", text)
        if code and code[1] != "2":  # TensorStore's own text describes "no such file" better.
            reason = os.strerror(int(code[1]))
        else:
            reason = text.split(" [tensorstore_spec")[0].splitlines()[0] if text else type(error).__name__
        raise UserError(f"{directory} {what}: {reason}") from error
