"""Stores each finished run as one JSON line, so that an interrupted comparison continues where it stopped."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of one system from one seed.

    Attributes:
        system: Name of the system, as table/row.
        seed: The seed.
        overall: Share of right answers on held-out images, from 0 to 1; the mean over the kinds of images.
        kinds: The share for each kind of images.
        parameters: Parameters without those of the encoder, which all systems share.
        added: Parameters of the projector and the re-fusion blocks alone.
        seconds: Seconds of training.
    """

    system: str
    seed: int
    overall: float
    kinds: dict[str, float]
    parameters: int
    added: int
    seconds: float


def append(path: Path, run: Run) -> None:
    """Appends a run in one write, so that the lines of processes that share the file do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(run)) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path) -> list[Run]:
    """Reads all runs of a file; an absent file has none.

    Raises:
        ValueError: A line is not a finished run. The message names the file and the line.
    """
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            runs.append(Run(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a run as one JSON object, found {line[:80]!r}") from error
    return runs
