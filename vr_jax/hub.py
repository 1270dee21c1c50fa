"""Folders that lie on the Hugging Face hub: names such as "Qwen/Qwen2-0.5B" wherever a folder is taken (a leaf module).

A folder that exists wins over a repository of the same name. Downloads go to the cache of the hub's client (HF_HOME)
and are reused.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Literal, cast

from vr_jax.errors import UserError
from vr_jax.storage import Path, PathLike, as_path, is_local

Kind = Literal["model", "dataset"]

# Both parts of a repository's name; the hub allows these characters.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".gz", ".zip", ".tar", ".py", ".safetensors", ".bin", ".png", ".jpg")
# Files of a model that nothing here reads. Repositories often hold the same weights in several of these formats.
_OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.tflite", "original/*", "onnx/*")
_PICKLED = ("*.bin", "*.pth", "*.pt")
DATA_FILES = ("*.parquet", "*.json", "*.jsonl")


class HubError(UserError):
    """A repository that cannot be fetched; the message is the reason, without a name."""


def is_hub_name(path: PathLike) -> bool:
    """Returns whether a text is meant as the name of a repository.

    That is so if it reads `<owner>/<name>`, does not look like a file, and neither it nor a folder `<owner>` exists.
    """
    text = os.fspath(path)
    if not is_local(text) or not _NAME.fullmatch(text) or text.lower().endswith(_FILE_SUFFIXES):
        return False
    return not os.path.exists(text) and not os.path.exists(text.partition("/")[0])


def local_folder(path: PathLike, kind: Kind = "model") -> Path:
    """Returns the folder that a text names: a path as it is, or the downloaded repository of that name.

    Args:
        path: A path, or the name of a repository on the hub.
        kind: What the repository holds. Of a data set only JSON and parquet files are fetched.

    Raises:
        UserError: The repository cannot be fetched; the message says why and what to do.
    """
    if not is_hub_name(path):
        return as_path(path)
    name = os.fspath(path)
    try:
        return pathlib.Path(_fetched(name, kind))
    except HubError as error:
        raise UserError(
            f"{name}: there is no such folder, and as the name of a {kind} on the Hugging Face hub it cannot be "
            f"fetched: {error}"
        ) from error


@functools.lru_cache(maxsize=64)
def _fetched(name: str, kind: Kind) -> pathlib.Path:
    """Downloads a repository, once in this process."""
    if kind == "dataset":
        return snapshot(name, "dataset", allow=DATA_FILES)
    folder = snapshot(name, "model", ignore=(*_OTHER_FORMATS, *_PICKLED))
    if any(folder.glob("*.safetensors")) or (folder / "params").is_dir():
        return folder
    return snapshot(name, "model", ignore=_OTHER_FORMATS)  # the weights are there in no other form than pickled


def snapshot(
    repo: str, kind: Kind = "model", *, allow: Sequence[str] | None = None, ignore: Sequence[str] | None = None
) -> pathlib.Path:
    """Downloads files of a repository into the cache of the hub's client, unless they are there.

    Args:
        repo: The repository, "<owner>/<name>".
        kind: What the repository holds.
        allow: Patterns of the files that are fetched; None is all of them.
        ignore: Patterns of files that are not fetched.

    Returns:
        The folder that holds the files.

    Raises:
        HubError: The files cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # It takes a second to import, and most commands do not need it.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The first base is the error of the hub's HTTP client (httpx or httpx2), from which its timeouts derive, too.
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    errors: tuple[type[Exception], ...] = (LocalEntryNotFoundError, HFValidationError, OSError, *network_errors)

    try:
        return pathlib.Path(
            snapshot_download(
                repo,
                repo_type=kind,
                allow_patterns=None if allow is None else list(allow),
                ignore_patterns=None if ignore is None else list(ignore),
            )
        )
    except errors as error:
        raise HubError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Says in one line why a repository cannot be fetched, and what to do where that is known."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    # The client first reports that nothing is cached. The cause says why it could not ask the hub.
    cause = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "the repository is gated; ask for access on its page, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository"
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            "not in the cache, and the client is offline (HF_HUB_OFFLINE); download it where there is a network "
            "(`hf download`) and give its folder, or set HF_HOME to a cache that holds it"
        )
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
