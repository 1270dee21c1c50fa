"""Checksums of the files of a checkpoint.

TensorStore checks what it reads of a checkpoint's index (the OCDBT manifest and B-tree nodes carry a CRC-32C), but not
the values of the arrays: of 25 single bits flipped over the data file of a checkpoint, most were restored as wrong
numbers without an error (docs/checkpoints.md). So every process records the size and the CRC-32 of the files that it
wrote. The record is written last and makes the checkpoint count.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from vr_jax import distributed
from vr_jax.storage import write_json

FILE_NAME = "checksums.process_{}.json"
_BLOCK_BYTES = 1 << 24


def record_file(directory: Path, process: int | None = None) -> Path:
    """Returns the file in which a process, by default this one, records the checksums of a checkpoint."""
    return directory / FILE_NAME.format(distributed.process_index() if process is None else process)


def record_files(directory: Path, written_by: int) -> list[Path]:
    """Returns the records that this process looks at when a run continues.

    Args:
        directory: The folder of a checkpoint.
        written_by: The number of processes that wrote it. Their records are shared among the processes of now.
    """
    mine = range(distributed.process_index(), written_by, distributed.process_count())
    return [record_file(directory, process) for process in mine]


def write_record(directory: Path) -> None:
    """Records size and CRC-32 of the files of a checkpoint that this process wrote.

    Args:
        directory: The folder of the checkpoint, which is otherwise complete.

    Raises:
        UserError: The record cannot be written.
        FileNotFoundError: There is no such folder.
    """
    if not directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    files = {str(file.relative_to(directory)): [file.stat().st_size, _crc32(file)] for file in _own_files(directory)}
    distributed.check_awake()  # With the record the checkpoint counts.
    write_json(record_file(directory), files)


def find_damage(records: Iterable[Path]) -> str | None:
    """Compares the files of a checkpoint with records of their checksums.

    Args:
        records: The records, which lie in the folder of the checkpoint.

    Returns:
        What differs first, with the name of the file, or None.
    """
    return next((found for found in map(_find_damage, records) if found is not None), None)


def _find_damage(path: Path) -> str | None:
    directory = path.parent
    try:
        expected = json.loads(path.read_text())
    except ValueError as error:
        return f"{path}: not valid JSON ({error})"
    for name, (size, crc) in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes, expected {size}"
        if _crc32(file) != crc:
            return f"{file}: CRC-32 differs from the one recorded when it was written"
    return None


def _own_files(directory: Path) -> Iterator[Path]:
    """The files of this process; those that carry no process number belong to the first one."""
    mine = distributed.process_index()
    for file in sorted(directory.rglob("*")):
        # The records of other processes, and the hidden files that become them at this moment.
        if file.name.removeprefix(".").startswith("checksums.") or not file.is_file():
            continue
        owners = [part.rsplit("_", 1)[1] for part in file.relative_to(directory).parts if "process_" in part]
        if (int(owners[0]) if owners else 0) == mine:
            yield file


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
