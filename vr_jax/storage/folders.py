"""Folders that are either complete or absent: the marker file `_COMPLETE`, written last, decides.

On a disk a folder is filled under another name beside its own (`.NAME.incomplete`) and then renamed. When it replaces
an older one, that is first renamed away (`.NAME.replaced`). A process that is killed between the two renames leaves a
complete folder under the first name; whoever reads or writes the folder next gives it its own name. So at every
moment either the old or the new folder can be read.

In a bucket, which has no renames, a folder is filled in place. The marker `_INCOMPLETE` is written first and says what
the folder holds besides; then what is replaced is removed, `_COMPLETE` first, and `_INCOMPLETE` is removed last. So a
folder that has only `_INCOMPLETE` counts as absent, and whoever writes it next knows what may be removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from vr_jax import distributed
from vr_jax.errors import UserError
from vr_jax.failures import close_after, free_bytes, size_text
from vr_jax.storage.files import Path, PathLike, as_path, file_errors, is_local, remove_folder, write_text
from vr_jax.storage.lease import directory_lock, lease, make_folder

COMPLETE_MARKER = "_COMPLETE"
_INCOMPLETE_MARKER = "_INCOMPLETE"  # only in buckets
_MARKER_TEXT = "This folder is complete: this file was written after all the others.\n"
_CONTENT = "Content: "  # begins the marker's line that names the files and folders in it
_KEPT = "Kept: "  # begins the line of `_INCOMPLETE` that names what others have put into the folder
_OWNER = "Owner: "  # begins the marker's line that names who may replace the folder, where it is not anyone


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


def owner_of(folder: PathLike) -> str | None:
    """Returns the owner that a complete folder names, "" if it names none, or None if it is not complete."""
    path = _real(folder)
    if not is_complete(path):
        return None
    return _noted(path, _OWNER)


def _noted(folder: Path, what: str, marker: str = COMPLETE_MARKER) -> str:
    """What a line of the marker of a folder says, or "" where there is no such line."""
    with file_errors(f"{folder} cannot be read"):
        if not (folder / marker).exists():
            return ""
        lines = (folder / marker).read_text().splitlines()
    return next((line.removeprefix(what) for line in lines if line.startswith(what)), "")


def _additions(folder: Path) -> list[str]:
    """What somebody has put into a complete folder since it was written, e.g. the results of an evaluation."""
    noted = _noted(folder, _CONTENT)
    if not noted:
        return []
    known = {COMPLETE_MARKER, _INCOMPLETE_MARKER, *json.loads(noted)}
    with file_errors(f"{folder} cannot be read"):
        return sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != ".")


def check_target(target: PathLike, *, overwrite: bool, owner: str = "") -> None:
    """Makes sure that `complete_directory` may write a folder; an empty folder counts as absent.

    Args:
        target: The folder to write.
        overwrite: Whether a folder that `complete_directory` has written may be replaced.
        owner: Who writes it; with an owner, only a folder of the same owner is replaced.

    Raises:
        UserError: The folder exists and may not be replaced, somebody else wrote it, or the path is a file.
    """
    path = _real(target)
    _finish_exchange(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; choose another name for the folder")
    with file_errors(f"{path} cannot be read"):
        if not any(path.iterdir()):
            return
    unfinished = (path / _INCOMPLETE_MARKER).exists() and not (path / COMPLETE_MARKER).exists()
    if unfinished:  # Somebody was killed who was allowed to write it.
        return
    if not overwrite:
        raise UserError(f"{path} exists; choose another folder, or overwrite it (--overwrite)")
    if owner and owner_of(path) != owner:
        raise UserError(f"{path} was not written by this run, so it is not replaced; move it away, or choose another")
    if not (path / COMPLETE_MARKER).exists():
        raise UserError(
            f"{path} holds files that vr-jax did not write (it has no {COMPLETE_MARKER}), so it is not replaced; "
            "choose another folder, or remove it yourself"
        )


@contextlib.contextmanager
def complete_directory(target: PathLike, *, size: int = 0, overwrite: bool = False, owner: str = "") -> Iterator[Path]:
    """Gives the block a folder to fill, which becomes `target` when the block succeeds and is removed otherwise.

    All processes of a run call it together and see the same folder; the first one creates it. What is promised holds
    when processes are killed at any moment; a power cut may in addition lose what the disk had not written yet.

    Args:
        target: The folder to write.
        size: Bytes that will be written, at least; they must be free.
        overwrite: Whether a folder that is there is replaced, if this function has written it. On a disk it can be read
            until the new one is complete. What others have put into it since moves to the new one.
        owner: Who writes the folder (`owner_of`); a folder of somebody else is then not replaced.

    Yields:
        The folder to write to, which exists and is empty, but for what others have put into that of a bucket.

    Raises:
        UserError: The folder exists and `overwrite` is not set, another process is writing it, the disk is full, or
            the operating system refuses something else.
    """
    final = _real(target)
    in_place = not is_local(final)
    written = final if in_place else _beside(final, "incomplete")
    first = distributed.is_first()
    with contextlib.ExitStack() as held, file_errors(f"{final} cannot be written", needed=size):

        def prepare() -> None:
            if not first:
                return
            check_target(final, overwrite=overwrite, owner=owner)
            make_folder(final.parent)
            held.enter_context(lease(_beside(final, "lock"), place=final))
            if in_place:
                _begin_in_place(final)
                return
            _check_free(final, size)
            _remove_replaced(final)
            _clear(written)
            written.mkdir(parents=True)

        def commit() -> None:
            if not first:
                return
            found = {path.name for path in written.iterdir()} - {_INCOMPLETE_MARKER} - set(_kept(written))
            content = json.dumps(sorted(found))
            notes = f"{_CONTENT}{content}\n" + (f"{_OWNER}{owner}\n" if owner else "")
            write_text(written / COMPLETE_MARKER, _MARKER_TEXT + notes)
            if in_place:
                (written / _INCOMPLETE_MARKER).unlink(missing_ok=True)
            else:
                _exchange(final, written)

        distributed.together(prepare)
        try:
            yield written
            distributed.together(commit)
        except BaseException as error:

            def clear() -> None:
                if not (written / COMPLETE_MARKER).exists():
                    _clear_in_place(written) if in_place else _clear(written)

            close_after(error, clear)
            raise


@contextlib.contextmanager
def results_folder(folder: PathLike, *results: str, overwrite: bool = False) -> Iterator[Path]:
    """Holds a folder from before some work until its results are written.

    So neither the work nor older results are lost: what could not be written is refused before the work begins.

    Args:
        folder: The folder, which is created; see `directory_lock`.
        results: Names of the files that will be written.
        overwrite: Whether files of these names may be replaced.

    Yields:
        The folder.

    Raises:
        UserError: There is such a file and `overwrite` is not set, or a folder has its name, another run holds the
            folder, or it cannot be written.
    """
    path = as_path(folder)
    with directory_lock(path):
        for name in results:
            if (path / name).is_dir():
                raise UserError(f"{path / name} is a folder, and the results are a file of that name; move it away")
            if not overwrite and (path / name).exists():
                raise UserError(f"{path / name} exists; choose another --output, or replace it with --overwrite")
        yield path


def _begin_in_place(folder: Path) -> None:
    """Makes a folder of a bucket incomplete, and removes what an earlier writer has written to it."""
    kept = _additions(folder) if (folder / COMPLETE_MARKER).exists() else _kept(folder)
    write_text(folder / _INCOMPLETE_MARKER, f"Somebody is writing this folder.\n{_KEPT}{json.dumps(kept)}\n")
    (folder / COMPLETE_MARKER).unlink(missing_ok=True)
    _empty_in_place(folder)


def _kept(folder: Path) -> list[str]:
    noted = _noted(folder, _KEPT, _INCOMPLETE_MARKER)
    return list(json.loads(noted)) if noted else []


def _empty_in_place(folder: Path) -> None:
    spared = {_INCOMPLETE_MARKER, *_kept(folder)}
    for one in folder.iterdir():
        if one.name not in spared:
            remove_folder(one) if one.is_dir() else one.unlink(missing_ok=True)


def _clear_in_place(folder: Path) -> None:
    """Removes what was written to a folder of a bucket; where others have put something there, the marker stays."""
    if not (folder / _INCOMPLETE_MARKER).exists():
        return
    _empty_in_place(folder)
    if not _kept(folder):
        (folder / _INCOMPLETE_MARKER).unlink(missing_ok=True)


def _real(path: PathLike) -> Path:
    """The absolute path; of a symbolic link on a disk, what it points to, which is what has to be renamed."""
    given = as_path(path)
    return pathlib.Path(os.path.realpath(given)) if is_local(given) else given


def _beside(target: Path, state: str) -> Path:
    """The name of a folder or file beside `target` that belongs to it."""
    return target.with_name(f".{target.name}.{state}")


def _exchange(target: Path, written: Path) -> None:
    """Gives a complete folder its name, and removes the one that had it."""
    replaced = _beside(target, "replaced")
    if target.exists():
        os.rename(target, replaced)
    _finish_exchange(target)
    with contextlib.suppress(OSError):  # The new folder has its name; the next writer removes the old one.
        _remove_replaced(target)


def _remove_replaced(target: Path) -> None:
    """Removes what `target` has replaced; what others put into it (e.g. results of `eval`) moves to the new one."""
    replaced = _beside(target, "replaced")
    for name in _additions(replaced) if target.exists() and replaced.exists() else ():
        if not (target / name).exists():
            os.rename(replaced / name, target / name)
    _clear(replaced)


def _finish_exchange(target: Path) -> None:
    """Gives a complete folder its name where nothing has that name; readers do it after a writer that was killed."""
    if not is_local(target) or target.exists():
        return
    written = _beside(target, "incomplete")
    if not (written / COMPLETE_MARKER).exists():
        return
    with file_errors(f"{written} cannot be renamed to {target.name}"), contextlib.suppress(FileNotFoundError):
        os.rename(written, target)  # The file is missing if the writer itself has renamed it just now.


def _clear(folder: Path) -> None:
    """Removes a folder, its marker first, so that what is left of it by a kill in between does not count."""
    (folder / COMPLETE_MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _check_free(target: Path, size: int) -> None:
    """Refuses to write more bytes than are free."""
    check_free(target.parent, size, f"{target} cannot be written")


def check_free(
    folder: PathLike, size: int, doing: str, advice: str = "free some space, or choose another disk"
) -> None:
    """Makes sure that a disk has room; a bucket has.

    Args:
        folder: A folder of the disk, which need not exist.
        size: Bytes that will be written.
        doing: What the message begins with.
        advice: What the message ends with.

    Raises:
        UserError: Fewer bytes are free; the message has both numbers.
    """
    free = free_bytes(folder)
    if is_local(folder) and free is not None and free < size:
        raise UserError(f"{doing}: {size_text(size)} are needed, {size_text(free)} are free on its disk; {advice}")
