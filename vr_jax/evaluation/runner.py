"""The evaluation of a model on the items of one benchmark, in batches over the devices and processes of a mesh."""

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
from typing import Any

import jax
from tqdm import tqdm

from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.distributed import gather, is_first, process_count, process_index, together
from vr_jax.errors import UserError
from vr_jax.evaluation import batching, bootstrap
from vr_jax.evaluation.interface import Benchmark, Item, ItemResult
from vr_jax.evaluation.run_directory import NoDirectory, RunDirectory
from vr_jax.inference import Generator, Reply
from vr_jax.sharding import batch_shards
from vr_jax.storage import Path

# The version of the fields of summary.json. Summaries of different versions are not combined.
VERSION = 2
# The errors that a metric can raise on a text that its author did not foresee. They cost one item, not the run.
_SCORING_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class NothingAsked(UserError):
    """None of some items could be asked, e.g. because their images are missing."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation on one benchmark.

    Attributes:
        benchmark: The benchmark.
        items: Its items.
        results: The results in the order of the items, those of an earlier, interrupted run included.
        summary: The content of summary.json.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    results: list[ItemResult]
    summary: dict[str, Any]


def evaluate_items(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    output: Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    on_batch: Callable[[Sequence[ItemResult]], None] | None = None,
) -> Evaluation:
    """Answers items by greedy decoding and scores the answers.

    The results are written to `output`, if it is given, after every batch. If `output` holds an interrupted run with
    the same settings, it continues. Items that could not be asked or scored are then tried again, because their files
    may have been repaired.

    Under `jax.set_mesh(mesh)` the rows of a batch are sharded over the axes "replica" and "fsdp". All processes of a
    run call the function together with the same arguments. Each prepares its share of every batch, and the first one
    writes.

    Args:
        generator: The model.
        processor: The processor of the model.
        benchmark: The benchmark.
        items: The items, which have different ids.
        output: The result folder (see `run_directory`). None writes nothing.
        settings: Further values that decide the answers, e.g. the checkpoint. A run in which they differ is refused.
        asked: The choices that led to the items, which are copied to the summary.
        batch_size: The number of items in a batch, over all processes. It is rounded up to fill the mesh.
        max_new_tokens: The largest number of tokens of a reply. None is the benchmark's own.
        overwrite: Whether the results of an earlier run are deleted.
        progress: Whether the first process shows a progress bar on standard error.
        on_batch: A function that the first process calls with the results of each batch once they are on disk.

    Returns:
        The results and the summary, on every process.

    Raises:
        UserError: There are no items, their ids are not unique, or the run in `output` cannot be continued.
        NothingAsked: None of the items can be asked.
    """
    ids = [item.id for item in items]
    if not items:
        raise UserError(f"{benchmark.name}: there are no items to answer")
    if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{benchmark.name}: some ids belong to several items: {repeated[:5]}; make the ids unique")
    limit = max_new_tokens or benchmark.max_new_tokens
    everything = {
        "benchmark": benchmark.name,
        "profile": benchmark.profile,
        **({"rules": benchmark.rules} if benchmark.rules else {}),
        "items": {"count": len(items), "sha256": items_digest(benchmark, items)},
        "max_new_tokens": limit,
        "generation": generator.settings.to_dict(),
        "template": processor.encoder.template,
        "model": generator.model.config.to_dict(),
        **(settings or {}),
    }
    with _run_directory(output, everything, overwrite) as run:
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
                    mean = scores.add(r.score for r in results)
                    if is_labelled(items):
                        bar.set_postfix({benchmark.headline: f"{mean:.3f}"})
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
            if clock.answered == 0 and earlier is not None:
                # Nothing was answered this time, so the measurement of the earlier run remains.
                summary["throughput"] = earlier["throughput"] | {"measured_earlier": True}
            if not is_labelled(items):
                together(partial(run.write_submission, benchmark.submission(items, results)))
            together(partial(run.write_summary, summary))
        else:
            if not is_labelled(items):
                together(_nothing)
            together(_nothing)
    return Evaluation(benchmark, items, results, summary)


def _nothing() -> None:
    """Stands for a write on the processes that do not write."""


def batches(
    generator: Generator,
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    todo: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, list[int], dict[int, Example | str]]]:
    """Yields the prompts of items in batches of one length bucket. All processes of a run call it together.

    Args:
        generator: The model, whose buckets limit the size of a prompt.
        processor: The processor of the model.
        benchmark: The benchmark of the items.
        items: All items.
        todo: The numbers of the items to prepare.
        batch_size: The number of items in a batch, over all processes.

    Yields:
        The number of rows of this process, the numbers of the items of all processes, and by number the prompts of this
        process's share, or "<reason>: <detail>" for an item that cannot be asked.
    """
    processor = dataclasses.replace(
        processor, max_tokens=generator.buckets.max_tokens, max_tiles=generator.buckets.max_tiles
    )
    rows = rows_per_process(batch_size)
    sizes = prompt_sizes(processor, benchmark, items, todo)
    planned = batching.batches(sizes, generator.buckets, rows * process_count())
    first = process_index() * rows
    mine = [batch[first : first + rows] for batch in planned]
    for batch, prepared in zip(planned, batching.prepared(processor, benchmark, items, mine), strict=True):
        yield rows, batch, prepared


def items_digest(benchmark: Benchmark, items: Sequence[Item]) -> str:
    """Computes a digest of the items' prompts and references, which differs for different sets of items."""
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
        """Adds values and returns the mean of all values so far."""
        for value in values:
            self.total, self.count = self.total + value, self.count + 1
        return self.total / self.count if self.count else 0.0


@dataclass
class _Clock:
    """The throughput of this session, without the items of an earlier, interrupted run.

    Attributes:
        answered: The number of items that the model answered.
        new_tokens: The number of tokens in the answers.
        computing: The seconds in compiled programs, with their compilation and the transfers to the devices.
        start: The time at which the session began.
    """

    answered: int = 0
    new_tokens: int = 0
    computing: float = 0.0
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
def _run_directory(
    output: Path | None, settings: Mapping[str, Any], overwrite: bool
) -> Iterator[RunDirectory | NoDirectory | None]:
    """Opens the result folder on the first process and yields None on the others. A refusal stops all processes."""

    def opened() -> RunDirectory | NoDirectory:
        return NoDirectory() if output is None else RunDirectory(output, settings, overwrite=overwrite)

    run = together(opened if is_first() else _nothing)
    with run or nullcontext():
        yield run


def rows_per_process(batch_size: int) -> int:
    """Computes the number of rows of each process.

    Args:
        batch_size: The number of items in a batch, over all processes. It is rounded up to fill the mesh in context.

    Raises:
        UserError: The batch size is below 1, or the batch cannot be divided evenly among the processes.
    """
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: expected at least 1")
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    processes = process_count()
    if shards % processes:
        raise UserError(
            f"the mesh divides a batch into {shards} parts (replica * fsdp), which cannot be shared evenly by "
            f"{processes} processes; make replica * fsdp a multiple of {processes}"
        )
    return -(-batch_size // shards) * shards // processes


def prompt_sizes(
    processor: Processor, benchmark: Benchmark, items: Sequence[Item], todo: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Computes the number of tokens and tiles of every prompt, of which each process measures its share.

    Args:
        processor: The processor of the model.
        benchmark: The benchmark of the items.
        items: All items.
        todo: The numbers of the items to measure.

    Returns:
        The number of tokens and of tiles, by the number of the item, on every process.
    """
    count, index = process_count(), process_index()
    shares = gather([batching.prompt_size(processor, benchmark, items[number]) for number in todo[index::count]])
    sizes = {}
    for k, number in enumerate(todo):
        tokens, tiles = shares[k % count][k // count]
        sizes[number] = (tokens, tiles)
    return sizes


def _replies(
    generator: Generator, prepared: Mapping[int, Example | str], rows: int, limit: int, clock: _Clock
) -> dict[int, Reply]:
    prompts = {number: prompt for number, prompt in prepared.items() if isinstance(prompt, Example)}
    if not prompts and process_count() == 1:
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
        score = float(benchmark.score(prediction, item)) if item.labelled else 0.0
    except _SCORING_ERRORS as error:
        return dataclasses.replace(known, error=f"scoring_failed: {type(error).__name__}: {error}")
    return dataclasses.replace(known, prediction=prediction, score=score)


def _summary(benchmark: Benchmark, items: Sequence[Item], results: Sequence[ItemResult]) -> dict[str, Any]:
    unscored = [result for result in results if result.error is not None]
    if len(unscored) == len(items):
        examples = "; ".join(f"{result.id}: {result.error}" for result in unscored[:3])
        raise NothingAsked(f"{benchmark.name}: none of {len(items)} items can be asked ({examples})")
    return {
        "version": VERSION,
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "headline": benchmark.headline,
        "group": benchmark.group,
        "profile": benchmark.profile,
        **(_scores(benchmark, items, results) if is_labelled(items) else {"score": None}),
        "items": len(items),
        "unscored": {  # These items count as wrong.
            "count": len(unscored),
            "by_reason": dict(Counter(str(result.error).split(":")[0] for result in unscored)),
            "items": {result.id: result.error for result in unscored},
        },
        "empty_replies": sum(result.prediction == "" for result in results),
        "unparsed_replies": sum(
            result.error is None and item.labelled and benchmark.unparsed(result.prediction or "", item)
            for item, result in zip(items, results, strict=True)
        ),
        "cut_off_at_max_new_tokens": sum(result.finish == "length" for result in results),
    }


def is_labelled(items: Sequence[Item]) -> bool:
    """Returns whether items have reference answers, without which there is no score."""
    return any(item.labelled for item in items)


def _scores(benchmark: Benchmark, items: Sequence[Item], results: Sequence[ItemResult]) -> dict[str, Any]:
    scores = [result.score for result in results]
    estimates = benchmark.estimates(items, scores)
    counts = Counter(item.category for item in items)
    return {
        **_estimate(estimates.overall, benchmark.name),  # These fields hold the score, from 0 to 100, and its interval.
        "metrics": benchmark.aggregate(items, scores),  # The metrics are in the units of lmms-eval.
        "categories": {
            category: _estimate(strata, f"{benchmark.name}/{category}") | {"items": counts[category]}
            for category, strata in estimates.categories.items()
        },
    }


def _estimate(strata: bootstrap.Strata, name: str) -> dict[str, Any]:
    drawn = bootstrap.draws(strata, name)
    return {
        "score": bootstrap.value(strata),
        "interval": list(bootstrap.interval(drawn)),
        "standard_error": float(drawn.std()),
    }
