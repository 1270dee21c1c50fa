"""The choice of each benchmark's folder below the folder that the user names."""

from __future__ import annotations

from collections.abc import Sequence

from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import BENCHMARKS
from vr_jax.evaluation.hub import repositories
from vr_jax.evaluation.interface import Benchmark
from vr_jax.storage import Path


def data_folder(benchmark: Benchmark, data: Path | None, *, several: bool) -> Path | None:
    """Finds the folder with a benchmark's files.

    With several benchmarks, `data` holds a folder for each. A folder is named like the benchmark or like its
    repository, with or without the owner, in upper or lower case. With one benchmark, `data` may also be that folder
    itself.

    Args:
        benchmark: The benchmark.
        data: The folder that the user named, or None.
        several: Whether several benchmarks are run.

    Returns:
        The folder, or None if the files are to be downloaded.

    Raises:
        UserError: There is no such folder. The message says what was looked for and what was found.
    """
    if data is None:
        return None
    if benchmark.published is None:
        if not several:
            raise UserError(f"--data = {data}: the benchmark {benchmark.name} reads no files; leave it out")
        return None
    names = [repo.split("/") for repo in repositories(benchmark.published.repo)]
    wanted = [[benchmark.name], names[0][1:], *names]
    found = [folder for parts in wanted for folder in _folders(data, parts)] if data.is_dir() else []
    if not several:
        if data.is_dir() and not any(data.glob("*.jsonl")):
            if found:
                return found[0]
            _refuse_others(benchmark, data)
        return data
    if found:
        return found[0]
    if not data.is_dir():
        raise UserError(f"{data}: no such folder")
    looked_for = ", ".join(dict.fromkeys("/".join(parts) for parts in wanted))
    raise UserError(
        f"{data}: there is no folder for {benchmark.name} (looked for {looked_for}); found "
        f"{[path.name for path in _subfolders(data)][:20]}; make a folder for each benchmark, or leave --data out to "
        "download the files from the hub"
    )


def _refuse_others(benchmark: Benchmark, data: Path) -> None:
    """Raises UserError if a folder holds other benchmarks, whose files may look like those of this benchmark."""
    own = {benchmark.name, benchmark.published.repo.split("/")[1].lower()} if benchmark.published else set()
    others = {
        name.lower()
        for one in BENCHMARKS.values()
        if one.published is not None and one.name != benchmark.name
        for name in (one.name, one.published.repo.split("/")[1])
    }
    # Folders may be named <owner>/<name>, which is one level further down.
    folders = [path for folder in _subfolders(data) for path in (folder, *_subfolders(folder))]
    found = [str(path.relative_to(data)) for path in folders if path.name.lower() in others - own]
    if found:
        raise UserError(
            f"{data} holds other benchmarks ({', '.join(found[:10])}) and no folder for {benchmark.name}; choose its "
            "own folder with --data, or leave --data out to download the files from the hub"
        )


def _folders(data: Path, parts: Sequence[str]) -> list[Path]:
    """Returns the folders `data/part/part...` in upper or lower case."""
    folders = [data]
    for part in parts:
        folders = [path for folder in folders for path in _subfolders(folder) if path.name.lower() == part.lower()]
    return folders


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
