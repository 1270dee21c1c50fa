"""Where the files of a benchmark lie."""

from __future__ import annotations

from pathlib import Path

from vr_jax.evaluation.types import Benchmark, EvaluationError


def data_folder(benchmark: Benchmark, data: Path | None, *, several: bool) -> Path | None:
    """The benchmark's own files. With several benchmarks, `data` holds a folder for each, named like the benchmark or
    like its repository. Raises EvaluationError naming what was looked for."""
    if benchmark.published is None or data is None or not several:
        return data
    owner, _, repository = benchmark.published.repo.partition("/")
    names = {benchmark.name.lower(), repository.lower()}
    found = [path for path in sorted(data.iterdir()) if path.name.lower() in names] if data.is_dir() else []
    if not found:
        raise EvaluationError(f"{data}: no folder {' or '.join(sorted(names))} for {benchmark.name}")
    return found[0]
