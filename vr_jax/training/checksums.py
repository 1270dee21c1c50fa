"""Checksums of the files of a checkpoint.

TensorStore checks what it reads of a checkpoint's index (the OCDBT manifest and B-tree nodes carry a CRC-32C), but not
the values of the arrays: of 25 single bits flipped over the data file of a checkpoint, most were restored as wrong
numbers without an error (docs/checkpoints.md). So every process records the size and the CRC-32 of the files that it
wrote. The record is written last and makes the checkpoint count.

A store keeps a CRC-32C of each object itself, computed as it arrived. For a checkpoint in a bucket the record holds
these, and one listing compares them: nothing is read a second time.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable

from vr_jax import distributed
from vr_jax.storage import BucketPath, Path, in_order, write_json

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
    files = states(directory, _is_own)
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
    found = states(directory, lambda name: name in expected)
    for name, (size, crc) in expected.items():
        file = directory / name
        if name not in found:
            return f"{file}: missing"
        if found[name][0] != size:
            return f"{file}: {found[name][0]} bytes, expected {size}"
        if found[name][1] != crc:
            return f"{file}: CRC-32 differs from the one recorded when it was written"
    return None


def states(directory: Path, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[int, int | str]]:
    """Returns the size and the checksum of the files below a folder, by their names relative to it.

    Args:
        directory: The folder.
        chosen: Whether a file of this name is looked at.

    Returns:
        The bytes of each file and its CRC-32, or, of an object in a bucket, the store's own checksum.
    """
    if isinstance(directory, BucketPath):
        return {name: (one.st_size, one.version) for name, one in directory.objects().items() if chosen(name)}
    files = {file.relative_to(directory).as_posix(): file for file in in_order(directory.rglob("*"))}
    own = {name: file for name, file in files.items() if chosen(name) and file.is_file()}
    return {name: (file.stat().st_size, _crc32(file)) for name, file in own.items()}


def _is_own(name: str) -> bool:
    """Whether a file is one of this process; those that carry no process number belong to the first one."""
    # The records of other processes, and the hidden files that become them at this moment.
    if name.rpartition("/")[2].removeprefix(".").startswith("checksums."):
        return False
    owners = [part.rsplit("_", 1)[1] for part in name.split("/") if "process_" in part]
    return (int(owners[0]) if owners else 0) == distributed.process_index()


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
