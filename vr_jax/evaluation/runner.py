"""Asks a model all items of a benchmark, in batches, over the mesh and over processes, and scores its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.distributed import gather, together
from vr_jax.evaluation import plan, statistics
from vr_jax.evaluation.run_directory import RunDirectory
from vr_jax.evaluation.types import Benchmark, EvaluationError, Item, ItemResult
from vr_jax.inference.generate import Generator, Reply
from vr_jax.sharding import batch_shards

VERSION = 2  # of what summary.json holds


@dataclass(frozen=True)
class Evaluation:
    """A finished run: `results` in the order of the items (also those of an interrupted run before), `summary` is what
    summary.json holds."""

    benchmark: Benchmark
    items: Sequence[Item]
    results: list[ItemResult]
    summary: dict[str, Any]


def evaluate(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    output: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    on_batch: Callable[[Sequence[ItemResult]], None] | None = None,
) -> Evaluation:
    """Greedy answers to `items`, written to `output` as they come (see `run_directory`); an interrupted run continues,
    and items that could not be read are tried again.

    Under `jax.set_mesh(mesh)` batches are sharded over ('replica', 'fsdp'). With several processes all call this
    together with the same arguments: each prepares its share of every batch, the first one writes.
    settings: what else decides the answers (the checkpoint): a run with other settings is not continued. asked: how the
    items were chosen, for the summary.
    batch_size: items per batch over all processes, rounded up to fill the mesh. on_batch: called after each batch
    is on disk (on the first process).
    Raises EvaluationError for no items, equal ids, a run directory that cannot be continued, or when not one item
    can be asked."""
    ids = [item.id for item in items]
    if not items:
        raise EvaluationError(f"{benchmark.name}: no items")
    if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
        raise EvaluationError(f"{benchmark.name}: item ids occur twice: {repeated[:5]}")
    limit = max_new_tokens or benchmark.max_new_tokens
    everything = {
        "benchmark": benchmark.name,
        "profile": benchmark.profile,
        "items": {"count": len(items), "sha256": items_digest(benchmark, items)},
        "max_new_tokens": limit,
        "template": processor.template,
        "model": generator.model.config.to_dict(),
        **(settings or {}),
    }
    with _run_directory(output, everything, overwrite) as run:
        # An item that could not be read is tried again: its file may have been repaired.
        answered = [result.id for result in run.results.values() if result.error is None] if run else []
        done = set(gather(answered)[0])
        todo = [number for number, item_id in enumerate(ids) if item_id not in done]
        clock = _Clock()
        scores = _RunningMean(result.score for result in run.results.values() if result.id in done) if run else None
        bar = tqdm(
            total=len(items), initial=len(done), unit="item", desc=benchmark.name, disable=not (progress and run)
        )
        with bar:
            for rows, batch, prepared in batches(generator, processor, benchmark, items, todo, batch_size):
                replies = _replies(generator, prepared, rows, limit, clock)
                own_problems = {number: text for number, text in prepared.items() if isinstance(text, str)}
                problems = {int(number): text for one in gather(own_problems) for number, text in one.items()}
                results = [
                    _result(benchmark, items[number], replies.get(number), problems.get(number))
                    for number in batch
                    if run
                ]
                together(partial(run.append, results) if run else _nothing)
                if run and scores:
                    bar.update(len(batch))
                    bar.set_postfix({benchmark.headline: f"{scores.add(r.score for r in results):.3f}"})
                    if on_batch:
                        on_batch(results)
        payload = [result.to_dict() for result in run.results.values()] if run else []
        found = {result["id"]: ItemResult.from_dict(result) for result in gather(payload)[0]}
        results = [found[item_id] for item_id in ids]
        summary = _summary(benchmark, items, results) | {
            "throughput": clock.throughput(resumed=len(done)),
            "asked": dict(asked or {}),
            "settings": everything,
        }
        if run:
            earlier = run.summary()
            if clock.answered == 0 and earlier is not None:  # nothing was measured: what was stays
                summary["throughput"] = earlier["throughput"] | {"measured_earlier": True}
            together(partial(run.write_summary, summary))
        else:
            together(_nothing)
    return Evaluation(benchmark, items, results, summary)


def _nothing() -> None:
    """The part of a process that does not write."""


def batches(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    todo: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, list[int], dict[int, Example | str]]]:
    """The items `todo` in batches of one length bucket: rows of this process, the numbers of all processes' items, and
    of this process' share the prompts, or what is wrong with them. All processes run it together."""
    processor = dataclasses.replace(
        processor, max_tokens=generator.buckets.max_tokens, max_tiles=generator.buckets.max_tiles
    )
    rows = rows_per_process(batch_size)
    sizes = prompt_sizes(processor, benchmark, items, todo)
    planned = plan.batches(sizes, generator.buckets, rows * jax.process_count())
    first = jax.process_index() * rows
    mine = [batch[first : first + rows] for batch in planned]
    for batch, prepared in zip(planned, plan.prepared(processor, benchmark, items, mine), strict=True):
        yield rows, batch, prepared


def items_digest(benchmark: Benchmark, items: Sequence[Item]) -> str:
    """Tells sets of items apart by what is asked and expected."""
    digest = hashlib.sha256()
    for item in items:
        prompt = "" if item.problem else benchmark.prompt(item)
        digest.update(json.dumps([item.id, prompt, item.answers, item.category, len(item.images)]).encode())
    return digest.hexdigest()


class _RunningMean:
    def __init__(self, values: Iterable[float]):
        self.total, self.count = 0.0, 0
        self.add(values)

    def add(self, values: Iterable[float]) -> float:
        """The mean with these values."""
        for value in values:
            self.total, self.count = self.total + value, self.count + 1
        return self.total / self.count if self.count else 0.0


@dataclass
class _Clock:
    """Throughput of this session, without what an interrupted run before had done."""

    answered: int = 0  # items that reached the model
    new_tokens: int = 0
    computing: float = 0.0  # seconds in the compiled programs, transfers and compilation included
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def throughput(self, *, resumed: int) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start
        return {
            "items": self.answered,
            "seconds": seconds,
            "seconds_computing": self.computing,
            "share_outside_computing": 1 - self.computing / seconds,
            "items_per_second": self.answered / seconds,
            "new_tokens_per_second": self.new_tokens / seconds,
            "items_of_an_earlier_session": resumed,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }


@contextmanager
def _run_directory(output: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[RunDirectory | None]:
    """The run directory on the first process, None on the others; a refusal there stops all."""
    first = jax.process_index() == 0
    run = together(partial(RunDirectory, output, settings, overwrite=overwrite) if first else _nothing)
    with run or nullcontext():
        yield run


def rows_per_process(batch_size: int) -> int:
    """Rows of each process for `batch_size` items over all of them, rounded up to fill the mesh in context."""
    if batch_size < 1:
        raise EvaluationError(f"batch_size = {batch_size}: expected at least 1")
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    processes = jax.process_count()
    if shards % processes:
        raise EvaluationError(
            f"the mesh cuts a batch into {shards} pieces for {processes} processes: make replica * fsdp a multiple"
        )
    return -(-batch_size // shards) * shards // processes


def prompt_sizes(
    processor: Processor, benchmark: Benchmark, items: Sequence[Item], todo: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Tokens and tiles of every prompt; each process measures its share."""
    count, index = jax.process_count(), jax.process_index()
    shares = gather([plan.prompt_size(processor, benchmark, items[number]) for number in todo[index::count]])
    return {todo[k]: tuple(shares[k % count][k // count]) for k in range(len(todo))}  # type: ignore[misc]


def _replies(
    generator: Generator, prepared: Mapping[int, Example | str], rows: int, limit: int, clock: _Clock
) -> dict[int, Reply]:
    prompts = {number: prompt for number, prompt in prepared.items() if isinstance(prompt, Example)}
    if not prompts and jax.process_count() == 1:
        return {}
    batch = generator.batch(prompts, rows)
    start = time.perf_counter()
    state = jax.block_until_ready(generator.decode(generator.prefill(batch, limit), limit))
    clock.computing += time.perf_counter() - start
    replies = generator.replies(state)
    clock.answered += len(replies)
    clock.new_tokens += sum(len(reply.tokens) for reply in replies.values())
    return replies


def _result(benchmark: Benchmark, item: Item, reply: Reply | None, problem: str | None) -> ItemResult:
    known = ItemResult(item.id, item.category, item.question, item.answers, prediction=None, score=0.0, error=problem)
    if reply is None:
        return known
    known = dataclasses.replace(known, prediction=reply.text, finish=reply.finish)
    try:
        prediction = benchmark.clean(reply.text)
        score = float(benchmark.score(prediction, item))
    except Exception as error:  # a metric may stumble over any text; one reply must not end the run
        where = f"{type(error).__name__}: {error}"
        return dataclasses.replace(known, error=f"scoring_failed: {where}")
    return dataclasses.replace(known, prediction=prediction, score=score)


def _summary(benchmark: Benchmark, items: Sequence[Item], results: Sequence[ItemResult]) -> dict[str, Any]:
    """Scores and counts."""
    unscored = [result for result in results if result.error is not None]
    if len(unscored) == len(items):
        examples = "; ".join(f"{result.id}: {result.error}" for result in unscored[:3])
        raise EvaluationError(f"{benchmark.name}: none of {len(items)} items can be asked ({examples})")
    scores = [result.score for result in results]
    estimates = benchmark.estimates(items, scores)
    counts = Counter(item.category for item in items)
    return {
        "version": VERSION,
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "group": benchmark.group,
        "profile": benchmark.profile,
        **_estimate(estimates.overall, benchmark.name),  # score, 0..100, with its 95 % interval
        "metrics": benchmark.aggregate(items, scores),  # in the reference's own units
        "items": len(items),
        "categories": {
            category: _estimate(strata, f"{benchmark.name}/{category}") | {"items": counts[category]}
            for category, strata in estimates.categories.items()
        },
        "unscored": {  # count as wrong
            "count": len(unscored),
            "by_reason": dict(Counter(str(result.error).split(":")[0] for result in unscored)),
            "items": {result.id: result.error for result in unscored},
        },
        "empty_replies": sum(result.prediction == "" for result in results),
        "unparsed_replies": sum(
            result.error is None and benchmark.unparsed(result.prediction or "", item)
            for item, result in zip(items, results, strict=True)
        ),
        "cut_off_at_max_new_tokens": sum(result.finish == "length" for result in results),
    }


def _estimate(strata: statistics.Strata, name: str) -> dict[str, Any]:
    drawn = statistics.draws(strata, name)
    return {
        "score": statistics.value(strata),
        "interval": list(statistics.interval(drawn)),
        "standard_error": float(drawn.std()),
    }
