"""Folders that are either complete or absent: the marker file `_COMPLETE`, written last, decides.

On a disk a folder is filled under another name beside its own (`.NAME.incomplete`) and then renamed. When it replaces
an older one, that is first renamed away (`.NAME.replaced`). A process that is killed between the two renames leaves a
complete folder under the first name; whoever reads or writes the folder next gives it its own name. So at every
moment either the old or the new folder can be read.

In a bucket, which has no renames, a folder is filled in place. What it replaces is removed before, marker first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from etils import epath

from vr_jax import distributed
from vr_jax.errors import UserError
from vr_jax.storage.files import PathLike, as_path, file_errors, is_local, write_text
from vr_jax.storage.lease import directory_lock, lease, make_folder

COMPLETE_MARKER = "_COMPLETE"
_MARKER_TEXT = "This folder is complete: this file was written after all the others.\n"


def is_complete(folder: PathLike) -> bool:
    """Returns whether a folder that `complete_directory` writes is there and whole."""
    path = _real(folder)
    _finish_exchange(path)
    return bool((path / COMPLETE_MARKER).exists())


def check_complete(folder: PathLike) -> None:
    """Makes sure that a folder that `complete_directory` writes is there and whole.

    Raises:
        UserError: The folder is absent, or whoever wrote it did not finish.
    """
    path = as_path(folder)
    if is_complete(path):
        return
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is a file, expected a folder")
    raise UserError(
        f"{path} is incomplete: it has no {COMPLETE_MARKER}, which is written last; write or copy it once more"
    )


def check_target(target: PathLike, *, overwrite: bool) -> None:
    """Makes sure that `complete_directory` may write a folder; an empty folder counts as absent.

    Raises:
        UserError: The folder exists and may not be replaced, or the path is a file.
    """
    path = _real(target)
    _finish_exchange(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose another name for the folder")
    if not overwrite and any(path.iterdir()):
        raise UserError(f"{path} exists; choose another folder, or overwrite it")


@contextlib.contextmanager
def complete_directory(target: PathLike, *, size: int = 0, overwrite: bool = False) -> Iterator[epath.Path]:
    """Gives the block a folder to fill, which becomes `target` when the block succeeds and is removed otherwise.

    All processes of a run call it together and see the same folder; the first one creates it. What is promised holds
    when processes are killed at any moment; a power cut may in addition lose what the disk had not written yet.

    Args:
        target: The folder to write.
        size: Bytes that will be written, at least; they must be free.
        overwrite: Whether a folder that is there is replaced. It can be read until the new one is complete.

    Yields:
        The folder to write to, which exists and is empty.

    Raises:
        UserError: The folder exists and `overwrite` is not set, another process is writing it, the disk is full, or
            the operating system refuses something else.
    """
    final = _real(target)
    written = _beside(final, "incomplete") if is_local(final) else final
    first = distributed.is_first()
    with contextlib.ExitStack() as held, file_errors(f"{final} cannot be written"):

        def prepare() -> None:
            if not first:
                return
            check_target(final, overwrite=overwrite)
            if is_local(final):
                make_folder(final.parent)
                held.enter_context(lease(_beside(final, "lock"), place=final))
                _check_free(final, size)
                _clear(_beside(final, "replaced"))
            _clear(written)
            written.mkdir(parents=True)

        def commit() -> None:
            if not first:
                return
            write_text(written / COMPLETE_MARKER, _MARKER_TEXT)
            if written != final:
                _exchange(final, written)

        distributed.together(prepare)
        try:
            yield written
            distributed.together(commit)
        except BaseException:
            if not (written / COMPLETE_MARKER).exists():
                with contextlib.suppress(OSError):  # The first error is the one to report.
                    _clear(written)
            raise


@contextlib.contextmanager
def results_folder(folder: PathLike, results: str, *, overwrite: bool = False) -> Iterator[epath.Path]:
    """Holds a folder from before some work until its results are written.

    So neither the work nor older results are lost: what could not be written is refused before the work begins.

    Args:
        folder: The folder, which is created; see `directory_lock`.
        results: Name of the file that tells that there are results already.
        overwrite: Whether such results may be replaced.

    Yields:
        The folder.

    Raises:
        UserError: There are results and `overwrite` is not set, another run holds the folder, or it cannot be written.
    """
    path = as_path(folder)
    with directory_lock(path):
        if not overwrite and (path / results).exists():
            raise UserError(f"{path / results} exists; choose another --output, or replace it with --overwrite")
        yield path


def _real(path: PathLike) -> epath.Path:
    """The absolute path; of a symbolic link on a disk, what it points to, which is what has to be renamed."""
    given = as_path(path)
    return epath.Path(os.path.realpath(given)) if is_local(given) else given


def _beside(target: epath.Path, state: str) -> epath.Path:
    """The name of a folder or file beside `target` that belongs to it."""
    return target.with_name(f".{target.name}.{state}")


def _exchange(target: epath.Path, written: epath.Path) -> None:
    """Gives a complete folder its name, and removes the one that had it."""
    replaced = _beside(target, "replaced")
    if target.exists():
        os.rename(target, replaced)
    _finish_exchange(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _finish_exchange(target: epath.Path) -> None:
    """Gives a complete folder its name where nothing has that name; readers do it after a writer that was killed."""
    if not is_local(target) or target.exists():
        return
    written = _beside(target, "incomplete")
    if not (written / COMPLETE_MARKER).exists():
        return
    with file_errors(f"{written} cannot be renamed to {target.name}"), contextlib.suppress(FileNotFoundError):
        os.rename(written, target)  # The file is missing if the writer itself has renamed it just now.


def _clear(folder: epath.Path) -> None:
    """Removes a folder, its marker first, so that what is left of it by a kill in between does not count."""
    (folder / COMPLETE_MARKER).unlink(missing_ok=True)
    if folder.exists():
        folder.rmtree()


def _check_free(target: epath.Path, size: int) -> None:
    """Refuses to write more bytes than are free."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise UserError(
            f"{target} cannot be written: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on its disk"
        )
