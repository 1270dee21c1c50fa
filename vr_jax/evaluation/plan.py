"""Which items are asked together: items of one length bucket, the largest first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from vr_jax.data import anyres
from vr_jax.data.images import open_image
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example
from vr_jax.evaluation.types import Benchmark, Item
from vr_jax.inference.buckets import Buckets, PromptTooLong
from vr_jax.inference.prompts import PromptError, user_turn


class Unanswerable(ValueError):
    """An item that cannot be asked; the message is its `error` in items.jsonl, "<reason>: <detail>"."""


def conversation_of(benchmark: Benchmark, item: Item) -> Conversation:
    """Raises Unanswerable for an item with a problem, or placeholders that do not match its images."""
    if item.problem is not None:
        raise Unanswerable(item.problem)
    text = benchmark.prompt(item)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold halves of characters; no tokenizer takes them
        raise Unanswerable(f"malformed_text: the prompt is no valid text ({error})") from None
    try:
        turn = user_turn(text, len(item.images))
    except PromptError as error:
        raise Unanswerable(f"image_count: {error}") from error
    return Conversation(item.id, (turn,), item.images)


def prompt_of(processor: Processor, benchmark: Benchmark, item: Item) -> Example:
    """The tokenised prompt with its tiles. Raises Unanswerable for images that cannot be read, and the like."""
    try:
        return processor.prompt(conversation_of(benchmark, item))
    except SkipRecord as error:
        raise Unanswerable(str(error)) from error


def prompt_size(processor: Processor, benchmark: Benchmark, item: Item) -> tuple[int, int]:
    """Tokens and tiles of the prompt, from the images' headers only: nothing is decoded. (0, 0) for an item that
    cannot be asked, which `prompt_of` will find out."""
    config = processor.config
    try:
        conversation = conversation_of(benchmark, item)
        text = processor.encoder.prompt(conversation.turns, has_image=bool(item.images))
        with ExitStack() as stack:
            opened = [stack.enter_context(open_image(image)) for image in item.images]
            sizes = [image.size for image in opened]
    except Exception:  # `prompt_of` meets it too, and says what it is
        return 0, 0
    layouts = [anyres.layout(size, config.cells_per_side, config.image, alone=len(sizes) == 1) for size in sizes]
    return len(text.tokens) + sum(len(one.cell) - 1 for one in layouts), sum(one.tiles for one in layouts)


def batches(sizes: Mapping[int, tuple[int, int]], buckets: Buckets, rows: int) -> list[list[int]]:
    """Numbers of items, `rows` at a time, sorted by bucket. The largest come first, so that a lack of memory shows at
    once and the estimated time left does not grow."""

    def key(number: int) -> tuple[int, int, int]:
        try:
            tokens, tiles = buckets.fit(*sizes[number])
        except PromptTooLong:
            tokens, tiles = 0, 0
        return -tiles, -tokens, number

    order = sorted(sizes, key=key)
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def prepared(
    processor: Processor,
    benchmark: Benchmark,
    items: Sequence[Item],
    batches: Sequence[Sequence[int]],
    *,
    workers: int | None = None,
    ahead: int = 2,
) -> Iterator[dict[int, Example | str]]:
    """For each batch its prompts, or what is wrong with them, by item number. Threads (one for each core, at most 16)
    prepare `ahead` batches while the device works on the one before."""

    def prepare(number: int) -> Example | str:
        try:
            return prompt_of(processor, benchmark, items[number])
        except Unanswerable as error:
            return str(error)
        except Exception as error:  # any file may be damaged in a way that nobody foresaw; it costs its item
            return f"preparation_failed: {type(error).__name__}: {error}"

    def collect(futures: Mapping[int, Future[Example | str]]) -> dict[int, Example | str]:
        return {number: future.result() for number, future in futures.items()}

    pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), thread_name_prefix="prepare")
    waiting: deque[dict[int, Future[Example | str]]] = deque()
    try:
        for batch in batches:
            waiting.append({number: pool.submit(prepare, number) for number in batch})
            if len(waiting) > ahead:
                yield collect(waiting.popleft())
        while waiting:
            yield collect(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
