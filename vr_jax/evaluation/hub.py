"""Downloads of a benchmark's files from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from vr_jax import hub
from vr_jax.errors import UserError
from vr_jax.storage import Path

# In July 2026 the copies of the datasets that lmms-eval reads moved to another owner. The columns are the same.
_MIRRORS = {"lmms-lab": "lmms-lab-encoder"}


def repositories(repo: str) -> list[str]:
    """Returns a repository "<owner>/<name>" and its mirror, if it has one."""
    owner, _, name = repo.partition("/")
    return [repo] + [f"{mirror}/{name}" for mirror in [_MIRRORS.get(owner)] if mirror]


def download(name: str, repo: str, patterns: Sequence[str], expected: str) -> Path:
    """Downloads files of a dataset into the cache of the hub's client (HF_HOME), unless they are there.

    If the repository does not exist, its mirror is tried.

    Args:
        name: The name of the benchmark, for messages.
        repo: The repository of the dataset.
        patterns: Patterns of the names of the files.
        expected: The names of the files, for messages.

    Returns:
        The folder that holds the files.

    Raises:
        UserError: The files cannot be downloaded. The message says how to use local files instead.
    """
    problems = []
    for candidate in repositories(repo):
        try:
            folder = hub.snapshot(candidate, "dataset", allow=patterns)
        except hub.HubError as error:
            problems.append(f"{candidate}: {error}")
            continue
        if any(folder.rglob("*.parquet")):
            return folder
        problems.append(f"{candidate}: the repository holds no such files")
    raise UserError(
        f"{name}: the data cannot be downloaded from the Hugging Face hub ({'; '.join(problems)}); choose a local "
        f"folder with --data, which should hold {expected}"
    )
