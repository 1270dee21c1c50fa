"""Weight files on disk: safetensors (one or sharded) and torch pickles in; sharded safetensors out."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vr_jax.errors import UserError

# Names of safetensors' types.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX_FILE = "model.safetensors.index.json"
# In order of preference: transformers', then LLaVA's stage-1 file.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "mm_projector.bin")
_INDEX_FILES = (INDEX_FILE, "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Tensor:
    """What a weight file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES, or a type that has no place here


class Checkpoint:
    """The weight files of a directory. `tensors`: name -> Tensor, read from the files' headers."""

    def __init__(self, directory: Path):
        """Raises UserError where there are none, or one is missing, truncated or not what it should be."""
        self.directory = directory
        self.files, listed = _weight_files(directory)
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            for name, shape, dtype in _header(file):
                if name in self.tensors:
                    raise UserError(f"{file} holds {name}, which {self.tensors[name].file.name} holds too")
                self.tensors[name] = Tensor(file, shape, dtype)
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise UserError(f"{file} lacks {name}, which the index of {directory} places there")

    def read(self, names: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The named tensors, file by file; never more than one in memory (a pickle: one file)."""
        for file in self.files:
            wanted = [name for name, tensor in self.tensors.items() if tensor.file == file and name in names]
            if not wanted:
                continue
            if file.suffix == ".safetensors":
                yield from _read_safetensors(file, wanted)
            else:
                tensors = _load_pickle(file)
                for name in wanted:
                    yield name, _from_torch(tensors.pop(name))


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing, no JSON or no object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def write_safetensors(
    directory: Path,
    sizes: Mapping[str, int],
    take: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Shards of at most `max_shard_bytes` (or one tensor) and their index; `sizes`: name -> bytes. One shard at a
    time is in memory."""
    shards = _shards(sizes, max_shard_bytes)
    files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        try:
            # transformers refuses a file without the format.
            save_file({name: take(name) for name in names}, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    for file in files:  # safetensors creates private files
        shutil.copymode(directory / INDEX_FILE, directory / file)


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Sequence[Sequence[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """Files, and tensor name -> file where there is an index."""
    for name in (_INDEX_FILES[0], _SINGLE_FILES[0], _INDEX_FILES[1], *_SINGLE_FILES[1:]):
        path = directory / name
        if not path.is_file():
            continue
        if name not in _INDEX_FILES:
            return [path], {}
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{path} has no weight_map")
        files = sorted({directory / Path(file).name for file in listed.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{directory} lacks {', '.join(absent)}, which {name} lists; download it again")
        return files, {tensor: directory / Path(file).name for tensor, file in listed.items()}
    raise UserError(f"{directory} holds no weights: expected one of {', '.join(_SINGLE_FILES + _INDEX_FILES)}")


def _open_safetensors(file: Path) -> Any:
    try:
        # Read, not mapped: mapped pages would count as memory of this process.
        return safe_open(file, framework="np", backend="pread")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated ({error}); download it again") from error


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                yield name, tuple(view.get_shape()), view.get_dtype()
    else:
        for name, tensor in _load_pickle(file).items():
            yield name, tuple(tensor.shape), _torch_dtypes().get(tensor.dtype, str(tensor.dtype))


def _read_safetensors(file: Path, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    with _open_safetensors(file) as tensors:
        for name in names:
            try:
                yield name, tensors.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{file}: cannot read {name} ({error})") from error


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "reading .bin files needs torch: pip install 'vr-jax[torch]', or convert them to safetensors first"
        ) from None
    return torch


def _torch_dtypes() -> dict[Any, str]:
    torch = _torch()
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _load_pickle(file: Path) -> dict[str, Any]:
    torch = _torch()
    try:
        with warnings.catch_warnings(action="ignore"):
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"would call {call[1]}" if call else "would run other code than torch's own, or it is damaged"
        raise UserError(f"{file} is refused: loading it {reason}") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error) or "unexpected end").splitlines()[0].split(". ")[0]
        raise UserError(f"{file} is damaged or truncated ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} is not a state dict: expected a dict of tensors")
    return state


def _from_torch(tensor: Any) -> np.ndarray:
    torch = _torch()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
