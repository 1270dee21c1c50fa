"""What `eval.py` runs: a checkpoint on a benchmark, from flags and an optional recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.runner import Evaluation, evaluate
from vr_jax.evaluation.types import EvaluationError
from vr_jax.inference.generate import Generator
from vr_jax.inference.loading import LOADING_ERRORS, load_for_inference, with_pruning
from vr_jax.model.config import LlavaConfig
from vr_jax.model_directory import read_config
from vr_jax.sharding import make_mesh

_SMALL_FILE = 1 << 16  # bytes

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, and how. Raises EvaluationError for a number that makes no sense."""

    checkpoint: Path
    benchmark: str
    data: Path | None = None
    output: Path | None = None  # default: <checkpoint>/eval; the run goes to <output>/<benchmark>
    split: str = "test"
    profile: str = "default"
    limit: int | None = None  # only the first items
    batch_size: int = 16
    max_new_tokens: int | None = None  # default: the benchmark's
    dtype: str | None = None
    overwrite: bool = False
    pruning: str | Mapping[str, Any] | None = None  # see `with_pruning`
    model: LlavaConfig | None = None  # default: the checkpoint's config.json
    mesh: Mapping[str, int] = field(default_factory=dict)  # arguments of `make_mesh`

    def __post_init__(self):
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name} = {value}: expected at least 1")


def options_of(flags: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> EvalOptions:
    """Flags that are set (not None) win over the recipe's `eval` section, which wins over the defaults; its `model`
    and `mesh` sections are taken as they are. Raises EvaluationError for an unknown field of `eval`, and for a missing
    checkpoint or benchmark."""
    recipe = recipe or {}
    values = dict(recipe.get("eval") or {})
    fields = {one.name for one in dataclasses.fields(EvalOptions)} - {"model", "mesh"}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise EvaluationError(f"config.eval: unknown field(s) {unknown}; known: {sorted(fields)}")
    values |= {name: value for name, value in flags.items() if value is not None}
    for name in ("checkpoint", "data", "output"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if isinstance(values.get("pruning"), Mapping | ConfigDict):
        values["pruning"] = _plain(values["pruning"])
    if recipe.get("model"):
        values["model"] = LlavaConfig.from_dict(_plain(recipe["model"]))
    if recipe.get("mesh"):
        values["mesh"] = _plain(recipe["mesh"])
    missing = sorted({"checkpoint", "benchmark"} - set(values))
    if missing:
        raise EvaluationError("missing: " + ", ".join(f"--{name}" for name in missing))
    return EvalOptions(**values)


def run(options: EvalOptions) -> Evaluation:
    """Raises EvaluationError or one of LOADING_ERRORS, each with a text for the user."""
    benchmark = get_benchmark(options.benchmark, options.profile)
    config = _model_config(options)  # a wrong checkpoint is reported before the data is read
    items = benchmark.items(options.data, options.split)[: options.limit]
    mesh = make_mesh(**options.mesh)  # type: ignore[arg-type]
    loaded = load_for_inference(options.checkpoint, mesh, config=config, dtype=options.dtype)
    with jax.set_mesh(mesh):
        return evaluate(
            Generator(loaded.model, loaded.tokenizer),
            loaded.processor,
            benchmark,
            items,
            (options.output or options.checkpoint / "eval") / options.benchmark,
            settings={"checkpoint": {"path": str(options.checkpoint), "sha256": fingerprint(options.checkpoint)}},
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            overwrite=options.overwrite,
        )


def _model_config(options: EvalOptions) -> LlavaConfig:
    saved = read_config(options.checkpoint)
    if options.model is None:
        return with_pruning(saved, options.pruning)
    # How it is computed is the recipe's to say; a difference in what is computed is worth a word.
    same_way = dataclasses.replace(options.model, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
    if same_way != saved:
        logger.warning("config.model differs from %s/config.json and is used instead", options.checkpoint)
    return with_pruning(options.model, options.pruning)


def _plain(section: Any) -> Any:
    """A recipe's section without ml_collections' types."""
    return section.to_dict() if hasattr(section, "to_dict") else dict(section)


def fingerprint(directory: Path) -> str:
    """Tells checkpoints apart without reading their arrays: names and sizes of the files, contents of the small ones
    (Orbax names its data files anew at every save)."""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(p for p in (directory / "params").rglob("*") if p.is_file())]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        if size <= _SMALL_FILE:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def report(summary: dict[str, Any]) -> str:
    """The scores as a few lines of text."""
    lines = [f"{summary['benchmark']} ({summary['profile']}): {summary['score']:.2f} on {summary['items']} items"]
    lines += [f"  {name}: {value:.4f}" for name, value in summary["metrics"].items()]
    if count := summary["unreadable"]["count"]:
        lines.append(f"  {count} items could not be asked and count as wrong: {summary['unreadable']['by_reason']}")
    throughput = summary["throughput"]
    lines.append(
        f"  {throughput['items']} items in {throughput['seconds']:.1f} s, {throughput['items_per_second']:.2f} items/s"
    )
    return "\n".join(lines)


def main(flags: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> int:
    """Runs and prints the scores; returns the exit status. Wrong input is one clear message on standard error."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates each restore
    try:
        summary = run(options_of(flags, recipe)).summary
    except (EvaluationError, *LOADING_ERRORS, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    if jax.process_index() == 0:
        print(report(summary))
    return 0
