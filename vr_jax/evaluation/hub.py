"""Where the files of a benchmark lie: a folder that the user names, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vr_jax.evaluation.types import Benchmark, EvaluationError

# lmms-eval's copies of the data sets moved in July 2026; the columns are the same.
_MIRRORS = {"lmms-lab": "lmms-lab-encoder"}


def data_folder(benchmark: Benchmark, data: Path | None, *, several: bool) -> Path | None:
    """The benchmark's own files; None: on the hub. With several benchmarks, `data` holds a folder for each, named like
    the benchmark or like its repository, with or without its owner (any case). With one, `data` may be either.

    Raises EvaluationError naming what was looked for, and what is there."""
    if benchmark.published is None or data is None:
        return data
    repository = benchmark.published.repo.split("/")
    mirror = [_MIRRORS.get(repository[0], repository[0]), repository[1]]
    wanted = [[benchmark.name], repository[1:], repository, mirror]
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
        raise EvaluationError(f"{data}: no such folder")
    names = dict.fromkeys("/".join(parts) for parts in wanted)
    raise EvaluationError(
        f"{data}: no folder for {benchmark.name} (looked for {', '.join(names)}); "
        f"it holds {[path.name for path in _subfolders(data)][:20]}. Give each benchmark such a folder, or leave "
        "--data out to fetch them from the hub"
    )


def _refuse_others(benchmark: Benchmark, data: Path) -> None:
    """A folder that holds other benchmarks only is not this one's, even where their files look alike."""
    from vr_jax.evaluation.benchmarks import BENCHMARKS  # they import this module

    own = {benchmark.name, benchmark.published.repo.split("/")[1].lower()} if benchmark.published else set()
    others = {
        name.lower()
        for one in BENCHMARKS.values()
        if one.published is not None and one.name != benchmark.name
        for name in (one.name, one.published.repo.split("/")[1])
    }
    folders = [path for folder in _subfolders(data) for path in (folder, *_subfolders(folder))]  # also <owner>/<name>
    found = [str(path.relative_to(data)) for path in folders if path.name.lower() in others - own]
    if found:
        raise EvaluationError(
            f"{data} holds other benchmarks ({', '.join(found[:10])}) and no folder for {benchmark.name}; give its own "
            "folder with --data, or leave --data out to fetch it from the hub"
        )


def _folders(data: Path, parts: Sequence[str]) -> list[Path]:
    """The folders `data/part/part...`, whatever their case."""
    folders = [data]
    for part in parts:
        folders = [path for folder in folders for path in _subfolders(folder) if path.name.lower() == part.lower()]
    return folders


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def download(name: str, repo: str, patterns: Sequence[str], expected: str) -> Path:
    """The folder with the files of a data set that match `patterns`, fetched into the hub client's cache (HF_HOME)
    unless they are there; the mirror is asked where the repository does not exist.

    expected: the files, as the message puts it. Raises EvaluationError without them, naming --data."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, repository = repo.partition("/")
    repositories = [repo] + [f"{mirror}/{repository}" for mirror in [_MIRRORS.get(owner)] if mirror]
    problems = []
    for candidate in repositories:
        try:
            folder = Path(snapshot_download(candidate, repo_type="dataset", allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            problems.append(f"{candidate}: {_reason(error)}")
            continue
        if any(folder.rglob("*.parquet")):
            return folder
        problems.append(f"{candidate}: it holds no such files")
    raise EvaluationError(
        f"{name}: the data could not be fetched from the Hugging Face hub ({'; '.join(problems)}). "
        f"Give its folder with --data; expected there: {expected}"
    )


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    cause = error.__cause__ or error  # the client says that nothing is cached, and why it could not ask
    if isinstance(error, GatedRepoError):
        return "access has to be asked for on its page"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository"
    if isinstance(cause, OfflineModeIsEnabled):
        return "not in the cache, and offline (HF_HUB_OFFLINE)"
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
