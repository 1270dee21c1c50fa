"""Trains and scores systems from cached encoder states, one after the other."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import jax
from flax import nnx

from benchmarks.accuracy.optimization import Trainer
from benchmarks.accuracy.preparation import Prepared
from benchmarks.accuracy.results import Run, append
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.systems import Entry, systems
from benchmarks.accuracy.training import Scorer, alignment_loss, answer_loss, new_model
from vr_jax.model.vlm import VisionLanguageModel

Job = tuple[Entry, int]  # a system and a seed


def pending(setting: Setting, runs: Iterable[Run], seeds: Sequence[int], patterns: Sequence[str]) -> list[Job]:
    """The systems and seeds that are not finished.

    All systems are trained from one seed before the next seed. Their order is that of the patterns that match their
    names. Training-free systems have one seed only, because there is only one uncompressed model.

    Raises:
        ValueError: A pattern matches no system. The message lists the systems.
    """
    known = systems(setting).entries
    matches = [fnmatch.filter(known, pattern) for pattern in patterns]
    for pattern, names in zip(patterns, matches, strict=True):
        if not names:
            raise ValueError(f"--systems {pattern!r} matches none of {', '.join(known)}")
    names = list(dict.fromkeys(name for group in matches for name in group))
    finished = {(run.system, run.seed) for run in runs}
    return [
        (known[name], seed)
        for number, seed in enumerate(seeds)
        for name in names
        if (known[name].is_trained or number == 0) and (name, seed) not in finished
    ]


def run_systems(
    setting: Setting, prepared: Prepared, jobs: Iterable[Job], results: Path, log: Callable[[str], None]
) -> None:
    """Trains and scores each system, and appends its run to the file `results`."""
    for entry, seed in jobs:
        start = time.perf_counter()
        model = new_model(entry.config, seed=seed, decoder=prepared.reader)
        parameters = count_parameters(model)
        model = _train(setting, prepared, entry, model, seed) if entry.is_trained else _training_free(prepared, model)
        seconds = time.perf_counter() - start
        score = Scorer().score(model, prepared.held_out, prepared.held_out_cached)
        kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in score.kinds.items())
        log(f"{entry.name} seed {seed}: {score.overall:.4f}  ({kinds})  {seconds:.0f} s")
        run = Run(
            system=entry.name,
            seed=seed,
            overall=score.overall,
            kinds=score.kinds,
            parameters=parameters,
            added=parameters - count_parameters(prepared.reader.decoder),
            seconds=round(seconds, 1),
        )
        append(results, run)


def _train(
    setting: Setting, prepared: Prepared, entry: Entry, model: VisionLanguageModel, seed: int
) -> VisionLanguageModel:
    """The projector alone, then everything: the paper's two phases."""
    data = prepared.train
    alignment = partial(alignment_loss, config=entry.config, words=prepared.reader.head_kernel())
    aligner: Trainer[nnx.Module] = Trainer(alignment, setting.system_alignment)
    model.projector = aligner.train(model.projector, data, data.rows, seed=seed)
    trainer: Trainer[VisionLanguageModel] = Trainer(answer_loss, setting.system)
    return trainer.train(model, data, data.rows, seed=seed)


def _training_free(prepared: Prepared, model: VisionLanguageModel) -> VisionLanguageModel:
    model.projector = prepared.reader.projector
    model.encoder = prepared.encoder.vision  # VisPruner reads the attention of the encoder's last layer.
    return model


def count_parameters(module: nnx.Module) -> int:
    """The number of the module's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(module))
