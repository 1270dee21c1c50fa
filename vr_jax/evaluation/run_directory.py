"""Where a run keeps its answers: appended as it goes, so that a killed run continues, and never mixed with another's.

settings.json   what decides the answers: checkpoint, benchmark, items, limits
items.jsonl     one `ItemResult` per line, flushed to disk after every batch; of two lines with one id the last counts
summary.json    scores and throughput, written at the end
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from vr_jax.evaluation.types import EvaluationError, ItemResult
from vr_jax.storage import LOCK_FILE, lease, make_folder, write_json

SETTINGS, ITEMS, SUMMARY = "settings.json", "items.jsonl", "summary.json"


class RunDirectory:
    """Opens or continues the run in `path`; a context manager. `results` holds what is done, by item id.

    overwrite: throw away what is there. Raises EvaluationError if the directory holds a run with other settings
    (naming each difference) or damaged lines, or another process is writing to it; OSError if it cannot be
    written."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False):
        self.path = path
        self._held = contextlib.ExitStack()
        make_folder(path)
        try:
            self._held.enter_context(lease(path / LOCK_FILE))
            self._items = self._held.enter_context((path / ITEMS).open("a+b"))
            if overwrite:
                self._items.truncate(0)
                for name in (SETTINGS, SUMMARY):
                    (path / name).unlink(missing_ok=True)
            self.results = self._continue(json.loads(json.dumps(settings)))
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, results: Iterable[ItemResult]) -> None:
        """Adds results and waits until they are on disk; what is there already is not written again."""
        results = [result for result in results if self.results.get(result.id) != result]
        self._items.write("".join(json.dumps(result.to_dict()) + "\n" for result in results).encode())
        self._items.flush()
        os.fsync(self._items.fileno())
        self.results |= {result.id: result for result in results}

    def summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote last, if that is there and can be read."""
        try:
            return json.loads((self.path / SUMMARY).read_bytes())
        except (OSError, ValueError):
            return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / SUMMARY, summary)

    def _continue(self, settings: Mapping[str, Any]) -> dict[str, ItemResult]:
        path = self.path / SETTINGS
        if not path.exists():
            if self._items.seek(0, os.SEEK_END):
                raise EvaluationError(f"{self.path} has {ITEMS} but no {SETTINGS}: not a run that can be continued")
            write_json(path, settings)
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise EvaluationError(f"{path} is damaged ({error}); start anew with --overwrite") from None
        found_differences = differences(found, settings)
        if found_differences:
            raise EvaluationError(
                f"{self.path} holds a run with other settings; choose another --output, or --overwrite it:\n"
                + "\n".join(f"  {line}" for line in found_differences)
            )
        results, complete = parse_results(self.path / ITEMS, self._read())
        self._items.truncate(complete)
        return results

    def _read(self) -> bytes:
        self._items.seek(0)
        return self._items.read()


def load_results(directory: Path) -> list[ItemResult]:
    """The results of a run, finished or not, in the order they were written. Raises EvaluationError."""
    path = directory / ITEMS
    if not path.is_file():
        raise EvaluationError(f"{directory} is not an evaluation run: it has no {ITEMS}")
    return list(parse_results(path, path.read_bytes())[0].values())


def parse_results(path: Path, data: bytes) -> tuple[dict[str, ItemResult], int]:
    """Results by id, and how many bytes are complete lines: a killed run may leave a torn last line, which does not
    count. Raises EvaluationError for any other line that is no result."""
    results: dict[str, ItemResult] = {}
    complete = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:complete].splitlines(), start=1):
        try:
            result = ItemResult.from_dict(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(
                f"{path}, line {number} is damaged ({error}); remove the line to have its item answered again"
            ) from None
        results[result.id] = result
    return results, complete


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """One line per leaf that differs. `path` leaves say where something lay, which decides no answer."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return [
            line
            for key in sorted({*found, *wanted})
            if key != "path"
            for line in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if found == wanted else [f"{name}: {found!r} there, {wanted!r} now"]
