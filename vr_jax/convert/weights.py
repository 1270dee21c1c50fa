"""Weight files: safetensors and torch pickles, sharded or not, are read; sharded safetensors are written."""

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
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.model_directory import read_json
from vr_jax.storage import Path, in_order, on_disk

# The types that are read, by their names in safetensors.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX_FILE = "model.safetensors.index.json"
PROJECTOR_FILE = "mm_projector.bin"  # all that the first stage of LLaVA writes
# The parameters that LLaVA trains in full beside LoRA, and the same as safetensors, which `adapter_export` writes.
NON_LORA_FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
# The first that exists is taken, which is transformers' order (`_get_resolved_checkpoint_files` of modeling_utils.py).
_WEIGHT_FILES = (
    "model.safetensors",
    INDEX_FILE,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    PROJECTOR_FILE,
    *NON_LORA_FILES,
)
# Files that a message names where none of those exists.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class Tensor:
    """The description of one tensor in a weight file.

    Attributes:
        file: The weight file.
        shape: The tensor's shape.
        dtype: The name of its type: a key of `DTYPES`, or another name for a type that cannot be imported.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The weight files of a directory.

    Attributes:
        directory: The directory.
        files: The weight files.
        tensors: The descriptions of all tensors by name, as the headers of the files give them.
    """

    def __init__(self, directory: Path, names: Sequence[str] = _WEIGHT_FILES):
        """Reads the headers.

        Args:
            directory: The directory.
            names: Names of weight files or of their index, of which the first that exists is taken.

        Raises:
            UserError: There are no weight files; or one is missing, damaged, or without a tensor that the index names.
        """
        self.directory = directory
        self.files, listed = _weight_files(directory, names)
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
        """Reads tensors file by file.

        Args:
            names: Names of tensors, as keys.

        Yields:
            A name and its tensor. One tensor is in memory at a time; of a pickle, one file.
        """
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


def write_safetensors(
    directory: Path,
    sizes: Mapping[str, int],
    take: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes safetensors and their index, one shard in memory at a time.

    Args:
        directory: The folder to write to.
        sizes: Bytes of every tensor by name.
        take: Returns a tensor by name.
        max_shard_bytes: Size of the largest file, unless one tensor is larger.

    Raises:
        OSError: A file cannot be written.
    """
    shards = _shards(sizes, max_shard_bytes)
    files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        try:
            # transformers refuses a file whose metadata do not name the format.
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
    for file in files:  # safetensors creates files that only their owner can read
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


def _weight_files(directory: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of a directory, and the file of each tensor where there is an index."""
    for name in names:
        path = directory / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path], {}
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{path} has no weight_map")
        for tensor, file in listed.items():
            if not isinstance(file, str) or not file or "/" in file or "\\" in file or file in (".", ".."):
                raise UserError(
                    f"{path}: weight_map[{tensor!r}] = {shown(file)}: expected the name of a file beside it"
                )
        files = sorted({directory / file for file in listed.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{directory} lacks {', '.join(absent)}, which {name} lists; download it again")
        return files, {tensor: directory / file for tensor, file in listed.items()}
    others = [path.name for path in in_order(directory.iterdir()) if path.suffix in _OTHER_WEIGHTS]
    found = f", found {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}" if others else ""
    raise UserError(f"{directory} holds no weights: expected one of {', '.join(names)}{found}")


def _open_safetensors(file: Path) -> Any:
    try:
        # The file is read and not mapped, since mapped pages count as memory of this process.
        return safe_open(on_disk(file), framework="np", backend="pread")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated ({_one_line(error)}); download it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


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
                raise UserError(f"{file}: cannot read {name} ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
            # Files of torch before 1.6 are not zip archives and cannot be mapped.
            local = on_disk(file)
            state = torch.load(local, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(local))
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
