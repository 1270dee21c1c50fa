"""Finished runs, one JSON line each, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """One system trained from one seed. Scores are shares of right answers on held-out images, 0..1.

    parameters: without the encoder, which all share. added: of projector and re-fusion block. seconds: training."""

    system: str
    seed: int
    overall: float
    kinds: dict[str, float]
    parameters: int
    added: int
    seconds: float


def append(path: Path, run: Run) -> None:
    """One write, so that lines of processes that share the file do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(run)) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path) -> list[Run]:
    """Raises ValueError naming the file and the line that is no finished run."""
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            runs.append(Run(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a run as one JSON object, found {line[:80]!r}") from error
    return runs
