"""Downloads of a benchmark's files from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vr_jax.errors import UserError

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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    problems = []
    for candidate in repositories(repo):
        try:
            folder = Path(snapshot_download(candidate, repo_type="dataset", allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            problems.append(f"{candidate}: {_reason(error)}")
            continue
        if any(folder.rglob("*.parquet")):
            return folder
        problems.append(f"{candidate}: the repository holds no such files")
    raise UserError(
        f"{name}: the data cannot be downloaded from the Hugging Face hub ({'; '.join(problems)}); choose a local "
        f"folder with --data, which should hold {expected}"
    )


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    # The client first reports that nothing is cached. The cause says why it could not ask the hub.
    cause = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "the repository is gated; ask for access on its page"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository"
    if isinstance(cause, OfflineModeIsEnabled):
        return "not in the cache, and the client is offline (HF_HUB_OFFLINE)"
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
