"""The questions of a validation: a benchmark by its name, or a file of one's own by the name of a metric."""

from __future__ import annotations

import difflib

from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import BENCHMARKS, get_benchmark
from vr_jax.evaluation.benchmarks.own import own_benchmark
from vr_jax.evaluation.data_folders import data_folder
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.evaluation.metrics.named import METRICS
from vr_jax.evaluation.runner import is_labelled
from vr_jax.hub import local_folder


def held_out_questions(
    name: str,
    metric: str,
    path: str = "",
    *,
    images: str = "",
    split: str = "",
    follow_links: bool = False,
    limit: int | None = None,
) -> tuple[Benchmark, list[Item]]:
    """Opens questions that are asked while a model trains.

    Args:
        name: The name of the validation, which a benchmark of one's own takes.
        metric: The name of a benchmark, or of a metric for questions of one's own.
        path: The folder of the benchmark's data, or the file with the questions. Empty downloads a published benchmark.
        images: The folder that image names of questions of one's own are relative to. Empty is the file's folder.
        split: The split of a benchmark. Empty is the published one.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
        limit: The number of questions, from the first on. None is all of them.

    Returns:
        The benchmark and its items, which have reference answers.

    Raises:
        UserError: The metric is unknown, a field has no effect with it, the data cannot be read, or they have no
            reference answers.
    """
    if metric in BENCHMARKS:
        _refuse(metric, {"images": images, "follow_links": follow_links}, "a benchmark finds its images itself")
        benchmark: Benchmark = get_benchmark(metric)
        data = data_folder(benchmark, local_folder(path, "dataset") if path else None, several=False)
        items = benchmark.limited(benchmark.items(data, split or None), limit)
    elif metric in METRICS:
        _refuse(metric, {"split": split}, "a file of questions is one split")
        if not path:
            raise UserError(f"metric = {metric!r} scores questions of your own: set source.path to their file")
        own = own_benchmark(name, path, images=images or None, metric=metric, limit=limit, follow_links=follow_links)
        benchmark, items = own, own.items()
    else:
        known = ["loss", *METRICS, *BENCHMARKS]
        near = difflib.get_close_matches(metric, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"metric = {metric!r}: {hint}expected one of {', '.join(known)}")
    if not is_labelled(items):
        raise UserError(f"the questions of {path or metric} have no reference answers, so they have no score")
    return benchmark, items


def _refuse(metric: str, given: dict[str, str | bool], why: str) -> None:
    """Refuses fields of the source that this metric does not read."""
    for field, value in given.items():
        if value:
            raise UserError(f"source.{field} = {value!r} has no effect with metric = {metric!r}: {why}")
