"""Trains and scores systems, one after the other, seeds of a system together so that they share a compilation."""

from __future__ import annotations

import fnmatch
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from flax import nnx

from benchmarks.accuracy.optimization import Trainer
from benchmarks.accuracy.preparation import Prepared
from benchmarks.accuracy.results import Run, append
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.systems import Entry, systems
from benchmarks.accuracy.training import Scorer, new_model, question_loss
from vr_jax.model.llava import Llava

Job = tuple[Entry, int]  # a system and a seed


def pending(setting: Setting, runs: Iterable[Run], seeds: Sequence[int], patterns: Sequence[str]) -> list[Job]:
    """What is not finished of the systems whose names match a pattern. Training-free systems have one seed: there is
    one uncompressed model.

    Raises ValueError for a pattern that matches nothing, listing the systems."""
    known = systems(setting).entries
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(f"--systems {pattern!r} matches none of {', '.join(known)}")
    finished = {(run.system, run.seed) for run in runs}
    return [
        (entry, seed)
        for name, entry in known.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        for seed in (seeds if entry.is_trained else seeds[:1])
        if (name, seed) not in finished
    ]


def share(jobs: Sequence[Job], part: int, parts: int) -> list[Job]:
    """The `part`-th of `parts` processes: every so many systems, with all their seeds."""
    names = list(dict.fromkeys(entry.name for entry, _ in jobs))[part::parts]
    return [(entry, seed) for entry, seed in jobs if entry.name in names]


def run_systems(
    setting: Setting, prepared: Prepared, jobs: Iterable[Job], results: Path, log: Callable[[str], None]
) -> None:
    for _, group in itertools.groupby(jobs, key=lambda job: job[0].name):
        trainer: Trainer[Llava] = Trainer(question_loss, setting.system)
        scorer = Scorer()
        for entry, seed in group:
            start = time.perf_counter()
            model = new_model(entry.config, seed=seed, decoder=prepared.reader)
            parameters = count_parameters(model)
            if entry.is_trained:
                model = trainer.train(model, prepared.train, prepared.train.rows, seed=seed, log=lambda _: None)
            else:
                model.projector = prepared.reader.projector
                model.vision = prepared.encoder.vision  # VisPruner looks at the attention of its last block
            seconds = time.perf_counter() - start
            score = scorer.score(model, prepared.held_out, prepared.held_out_cached)
            kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in score.kinds.items())
            log(f"{entry.name} seed {seed}: {score.overall:.4f}  ({kinds})  {seconds:.0f} s")
            append(
                results,
                Run(
                    system=entry.name,
                    seed=seed,
                    overall=score.overall,
                    kinds=score.kinds,
                    parameters=parameters,
                    added=parameters - count_parameters(prepared.reader.decoder),
                    seconds=round(seconds, 1),
                ),
            )


def count_parameters(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(module))
