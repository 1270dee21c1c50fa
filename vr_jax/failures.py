"""What a disk, the memory, a library or another process can fail with, told in one line (a leaf module without JAX).

A failure is no mistake in the program, and yet it can come from any line of it: a full disk from each write, and full
memory from each array. `as_user_error` recognises such errors, whatever class the library at fault has given them.
Three places call it: `vr_jax.storage` where it opens, writes and renames, `vr_jax.distributed` where processes agree on
an error, and `vr_jax.cli` for what has passed both. Every other error is a fault of the program and stays a traceback.

`close_after` keeps the first error: closing files and releasing folders after it often fails too, with an error that
says less.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vr_jax.errors import ProcessLost, UserError

logger = logging.getLogger("vr_jax.failures")

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = {
    *(errno.ESTALE, errno.ENODEV, errno.EIO, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
    *(errno.EREMOTEIO, errno.ENOMEDIUM, errno.EHOSTUNREACH, errno.ESHUTDOWN),
}
_ADVICE = {
    **dict.fromkeys(_FULL, "free some space, or choose another folder"),
    **dict.fromkeys(_FORBIDDEN, "choose a folder that this user may write to and read from"),
    **dict.fromkeys(_GONE, "the disk does not answer; check its mount, and start the same command again"),
    errno.EFBIG: "files may not become that large here; raise the limit (ulimit -f), or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is expected; choose another name",
    errno.EISDIR: "a folder stands where a file is expected; choose another name",
    errno.EEXIST: "something of that name is there already; choose another name",
    errno.ENOENT: "check the path, and whether its disk is still mounted",
    errno.EMFILE: "raise the limit of open files, e.g. ulimit -n 8192",
    errno.ENFILE: "this machine has no more open files; end other programs",
    errno.ENOMEM: "end other programs, or ask for less memory",
    errno.ELOOP: "symbolic links point at each other; choose another name",
    errno.EINVAL: "this disk cannot do it; choose another folder",
    errno.ENOTEMPTY: "another program writes to this folder; end it",
    errno.EBUSY: "another program uses it; end it",
    errno.ETXTBSY: "another program uses it; end it",
}
# How libraries in C++ and Rust name the error of the operating system: TensorStore, Rust, Python.
_NUMBERS = (
    re.compile(r"os_error_code='(\d+)'"),
    re.compile(r"\(os error (\d+)\)"),
    re.compile(r"\[Errno (\d+)\]"),
    re.compile(r"\[OS error (\d+):"),
)
# Errors that are recognised by their words where a library quotes no number. These words have no other meaning.
_WORDS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ENOTCONN, errno.EREMOTEIO),
)
# How the messages of XLA begin, which come as JaxRuntimeError, ValueError or RuntimeError.
_STATUS = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED|FAILED_PRECONDITION): "
)
_DEVICE_FULL = ("RESOURCE_EXHAUSTED", "Out of memory", "CUDA_ERROR_OUT_OF_MEMORY")  # of a CPU it is the host's memory
_PROCESS_LOST = (
    *("Gloo", "Connection closed by peer", "Connection reset by peer", "coordination service", "CoordinationService"),
    *("heartbeat", "Barrier timed out", "UNAVAILABLE:", "DEADLINE_EXCEEDED"),
)
# How TensorStore names an object of a bucket that it could not reach after all its attempts.
_STORE = re.compile(r"Error (?:reading|writing|deleting|listing|opening)\b.*(gs://[^\s\":]+)\"?: (.*)")
_DETAILS = re.compile(r" \[(?:tensorstore_spec|source locations)")  # what follows is for its developers
_WORKER_LOST = re.compile(r"process was terminated (unexpectedly|abruptly)")  # of Grain, and of concurrent.futures
_NO_BACKEND = ("Unable to initialize backend", "Unknown backend", "No visible")  # of JAX, as RuntimeError
# The modules of optional libraries, and the extra of this package that installs each of them.
EXTRAS = {
    "torch": "torch",
    "matplotlib": "benchmarks",
    "gradio": "app",
    "wandb": "wandb",
    "trackio": "trackio",
    "apache_beam": "beam",
    "lmms_eval": "lmms-eval",
    "accelerate": "lmms-eval",
    "datasets": "lmms-eval",
    "libtpu": "tpu",
    "gcsfs": "gcs",
    "s3fs": "s3",
}
DISTRIBUTION = "vr-jax"
_PACKAGE = "vr_jax"


def as_user_error(error: BaseException) -> UserError | None:
    """Returns the error to report for a failure, or None for a fault of the program.

    The causes of an error and the members of an exception group are looked at too, since libraries wrap what fails in
    their threads.

    Args:
        error: What was raised.
    """
    looked: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        one = queue.pop(0)
        if id(one) in looked:
            continue
        looked.add(id(one))
        found = _described(one)
        if found is not None:
            return found
        queue += [*(one.exceptions if isinstance(one, BaseExceptionGroup) else ()), *filter(None, [one.__cause__])]
    return None


def _described(error: BaseException) -> UserError | None:
    if isinstance(error, UserError):
        return error
    if isinstance(error, BrokenPipeError):
        return None  # The reader of the output has gone, which `vr_jax.cli` tells apart.
    if isinstance(error, MemoryError):
        return UserError(f"this machine's memory does not suffice; {_LESS_MEMORY}{_detail(error)}")
    if isinstance(error, ImportError):
        return _missing_library(error)
    text = str(error)
    if (failed := store_failure(error)) is not None:
        return UserError(failed)
    if _STATUS.match(text):
        if any(word in text for word in _DEVICE_FULL):
            return UserError(f"the devices' memory does not suffice; {_LESS_MEMORY}{_detail(error)}")
        if any(word in text for word in _PROCESS_LOST):
            return ProcessLost(
                f"another process of the run has ended or does not answer; its own log says why{_detail(error)}"
            )
    if text.startswith(_NO_BACKEND):
        return UserError(f"the devices cannot be used; check JAX_PLATFORMS and the driver{_detail(error)}")
    if _WORKER_LOST.search(text):
        return UserError(
            "a process that reads the data was ended from outside, most often because this machine's memory is full; "
            f"lower config.data.workers or end other programs{_detail(error)}"
        )
    if error_number(error) is not None:
        return UserError(explain(error))
    return None


def store_failure(error: BaseException) -> str | None:
    """Returns the line that says which object of a bucket TensorStore could not reach, or None for another error.

    Args:
        error: What was raised.
    """
    lines = str(error).strip().splitlines()
    found = _STORE.search(_DETAILS.split(lines[0])[0]) if lines else None
    if found is None:
        return None
    return (
        f"{found[1]} cannot be read or written: after several attempts the store answers: {found[2][:200]}; when it is "
        "back, start the same command again"
    )


_LESS_MEMORY = (
    "lower what is held at a time (batch.rows, batch.tokens or batch.tiles with more batch.accumulation, batch_size, "
    "data.workers), choose dtype bfloat16 or model.remat full, or take more devices"
)


def _detail(error: BaseException) -> str:
    """The first line of an error's text in parentheses, cut to a length that can be read."""
    lines = str(error).strip().splitlines()
    if not lines:
        return ""
    text = lines[0]
    return f" ({text[:200]}{'...' if len(text) > 200 else ''})"


def _missing_library(error: ImportError) -> UserError | None:
    """The error for a library that is not installed; one for a module of this package is a fault of the program."""
    name = (error.name or "").partition(".")[0]
    if name == _PACKAGE or not (isinstance(error, ModuleNotFoundError) or not error.name):
        return None
    if not name:  # transformers says in words which library a tokenizer needs
        return UserError(f"a library is missing: {' '.join(str(error).split())[:300]}")
    extra = EXTRAS.get(name)
    install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {name}"
    return UserError(f"the library {name} is not installed; {install}")


def error_number(error: BaseException) -> int | None:
    """Returns the number of the operating system's error (`errno`) that an exception carries or quotes, or None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    found = next((match for pattern in _NUMBERS if (match := pattern.search(text))), None)
    if found:
        return int(found[1])
    for number in _WORDS:  # array_record quotes the words without the number
        if os.strerror(number) in text:
            return number
    return 0 if isinstance(error, OSError) else None


def explain(error: BaseException, *, needed: int = 0, known: str = "") -> str:
    """Returns why the operating system refused something: its words, the file, numbers for a full disk, and advice.

    Args:
        error: An `OSError`, or an error of a library that quotes the operating system's.
        needed: Bytes that were to be written, if they are known.
        known: What the message has said before; a file that it names is not named again.
    """
    number = error_number(error) or 0
    words = os.strerror(number) if number else (" ".join(str(error).split())[:300] or type(error).__name__)
    names = [os.fspath(name) for name in (_filename(error), _filename2(error)) if name]
    named = [name for name in names if name not in known]
    parts = [f"{' to '.join(named)}: {words}" if named else words]
    if number in _FULL:
        place = names[0] if names else known.split(" ")[0]
        room = free_bytes(place) if os.path.isabs(place) or os.path.lexists(place) else None
        if needed:
            parts.append(f"{size_text(needed)} needed")
        if room is not None:
            parts.append(f"{size_text(room)} free")
        parts = [", ".join(parts)]
    if number in _ADVICE:
        parts.append(_ADVICE[number])
    return "; ".join(parts)


def _filename(error: BaseException) -> str | None:
    name = getattr(error, "filename", None)
    if isinstance(name, bytes):
        return os.fsdecode(name)
    if isinstance(name, str):
        return name
    quoted = re.search(r"local file \"([^\"]+)\"|Error (?:opening|writing|reading) [^:]*?\"([^\"]+)\"", str(error))
    return (quoted[1] or quoted[2]) if quoted and not isinstance(error, OSError) else None


def _filename2(error: BaseException) -> str | None:
    name = getattr(error, "filename2", None)
    return name if isinstance(name, str) else None


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Returns the bytes that are free for this user on the disk of a path, or None where nobody can tell.

    Args:
        path: A file or a folder; where it does not exist, the nearest folder above it counts.
    """
    place = os.path.abspath(os.fspath(path))
    while True:
        try:
            return shutil.disk_usage(place).free
        except OSError:
            above = os.path.dirname(place)
            if above == place:
                return None
            place = above


def size_text(size: float) -> str:
    """Returns a number of bytes as messages show it, e.g. "1.25 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} bytes"


@contextmanager
def first_error_kept(close: Callable[[], object]) -> Iterator[None]:
    """Calls a function at the end of the block, whose own error counts only if the block had none.

    Args:
        close: What ends the use of something.
    """
    try:
        yield
    except BaseException as error:
        close_after(error, close)
        raise
    close()


def close_after(error: BaseException | None, close: Callable[[], object]) -> None:
    """Calls a function that closes something, for an `__exit__` that must not hide the error it is called with.

    Args:
        error: The error that ends the block, if there is one.
        close: What ends the use of something. After an error, its own error is a line of the debug log.
    """
    if error is None:
        close()
        return
    try:
        close()
    except Exception as later:  # The first error says what happened; this one often is only its consequence.
        logger.debug("closing after an error failed too: %s", later, exc_info=later)
