"""The result folder of one benchmark, from which an interrupted run continues.

The folder holds these files:

* `settings.json`: everything that decides the answers, i.e. the checkpoint, the model, the items and the limits. A run
  with other settings is refused, so that results are never mixed.
* `items.jsonl`: one `ItemResult` per line, written to disk after every batch. Of two lines with the same id, the last
  one counts.
* `summary.json`: the scores and the throughput, written at the end.
* `submission.json`: where the data have no reference answers, the predictions as the benchmark's server takes them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

from vr_jax.errors import UserError
from vr_jax.evaluation.interface import ItemResult
from vr_jax.failures import close_after
from vr_jax.storage import LOCK_FILE, AppendedFile, Path, lease, make_folder, write_json

SETTINGS, ITEMS, SUMMARY = "settings.json", "items.jsonl", "summary.json"
SUBMISSION = "submission.json"


class RunDirectory:
    """The result folder of one benchmark, opened for writing; a context manager.

    Attributes:
        path: The folder.
        results: The results that are on disk, by the id of the item.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False):
        """Opens a folder, in which an earlier run with the same settings continues.

        Args:
            path: The folder, which is created.
            settings: Everything that decides the answers, as JSON-safe values.
            overwrite: Whether the results of an earlier run are deleted.

        Raises:
            UserError: The folder holds a run with other settings (the message names each difference) or a damaged file,
                another process is writing to it, or it cannot be written.
        """
        self.path = path
        self._held = contextlib.ExitStack()
        make_folder(path)
        try:
            self._held.enter_context(lease(path / LOCK_FILE))
            self._items = self._held.enter_context(AppendedFile(path / ITEMS))
            if overwrite:
                self._items.truncate(0)
                for name in (SETTINGS, SUMMARY):
                    (path / name).unlink(missing_ok=True)
            self.results = self._continue(json.loads(json.dumps(settings)))
        except BaseException as error:
            close_after(error, self._held.close)
            raise

    def __enter__(self) -> Self:
        """Returns the folder itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Releases the folder for other processes."""
        close_after(error, self._held.close)

    def append(self, results: Iterable[ItemResult]) -> None:
        """Adds results, and returns once they are on disk. A result that is there already is not written again."""
        results = [result for result in results if self.results.get(result.id) != result]
        self._items.append("".join(json.dumps(result.to_dict()) + "\n" for result in results).encode(), sync=True)
        self.results |= {result.id: result for result in results}

    def summary(self) -> dict[str, Any] | None:
        """Returns the summary of an earlier run, or None if there is none that can be read."""
        try:
            return json.loads((self.path / SUMMARY).read_bytes())
        except (OSError, ValueError):
            return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary."""
        write_json(self.path / SUMMARY, summary)

    def write_submission(self, predictions: Any) -> None:
        """Writes the predictions of a split without reference answers."""
        write_json(self.path / SUBMISSION, predictions)

    def _continue(self, settings: Mapping[str, Any]) -> dict[str, ItemResult]:
        """Returns the results of an earlier run, after comparing its settings with the present ones."""
        path = self.path / SETTINGS
        if not path.exists():
            if self._items.read():
                raise UserError(
                    f"{self.path} has a file {ITEMS} but no {SETTINGS}, so that it is unknown which run it belongs to; "
                    "choose another --output, or replace the file with --overwrite"
                )
            write_json(path, settings)
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); start anew with --overwrite") from None
        found_differences = differences(found, settings)
        if found_differences and not self._answers():
            # Nothing is lost: the earlier run could not ask a single item, e.g. because its images were missing.
            self._items.truncate(0)
            (self.path / SUMMARY).unlink(missing_ok=True)
            write_json(path, settings)
            return {}
        if found_differences:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(found_differences)}); choose another "
                "--output, or replace the results with --overwrite"
            )
        results, complete = parse_results(self.path / ITEMS, self._items.read())
        self._items.truncate(complete)
        return results

    def _answers(self) -> bool:
        """Returns whether the earlier run holds a reply of the model. A damaged file counts as one that does."""
        try:
            results, _ = parse_results(self.path / ITEMS, self._items.read())
        except UserError:
            return True
        return any(result.finish is not None for result in results.values())


class NoDirectory:
    """Stands for the result folder of an evaluation whose results are only returned.

    Attributes:
        results: The results so far, by the id of the item.
    """

    def __init__(self) -> None:
        """Starts without results."""
        self.results: dict[str, ItemResult] = {}

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Releases nothing."""

    def append(self, results: Iterable[ItemResult]) -> None:
        """Adds results."""
        self.results |= {result.id: result for result in results}

    def summary(self) -> None:
        """Returns that there is no earlier run."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def write_submission(self, predictions: Any) -> None:
        """Writes nothing."""


def load_results(directory: Path) -> list[ItemResult]:
    """Reads the results of a run, finished or not, in the order in which they were written.

    Raises:
        UserError: The folder holds no run, or its results are damaged.
    """
    path = directory / ITEMS
    if not path.is_file():
        raise UserError(f"{directory} is not the result folder of a benchmark: it has no {ITEMS}")
    return list(parse_results(path, path.read_bytes())[0].values())


def parse_results(path: Path, data: bytes) -> tuple[dict[str, ItemResult], int]:
    """Parses the content of `items.jsonl`.

    A run that was killed may leave an incomplete last line, which is ignored.

    Args:
        path: The file, for messages.
        data: Its content.

    Returns:
        The results by the id of the item, and the number of bytes of the complete lines.

    Raises:
        UserError: Another line is not a result.
    """
    results: dict[str, ItemResult] = {}
    complete = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:complete].splitlines(), start=1):
        try:
            result = ItemResult.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}); remove the line to have its item answered again"
            ) from None
        results[result.id] = result
    return results, complete


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Compares two nested dictionaries of settings.

    Keys named `path` are ignored, because the place of a file does not change the answers. A key named `sha256` stands
    for a content, whose sums would tell a reader nothing.

    Args:
        found: The settings in a file.
        wanted: The present settings.
        name: The dotted name of the compared value, for nested dictionaries.

    Returns:
        One line for each value that differs.
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return [
            line
            for key in sorted({*found, *wanted})
            if key != "path"
            for line in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    if found == wanted:
        return []
    owner, _, key = name.rpartition(".")
    if key == "sha256" and found is not None and wanted is not None:
        return [f"{owner}: the content differs"]
    return [f"{name}: {found!r} there, {wanted!r} now"]
