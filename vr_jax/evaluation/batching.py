"""Batches of items whose prompts have about the same length, and their preparation in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from vr_jax.data.images import DECODE_ERRORS, open_image, size_of
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text, place_images
from vr_jax.data.types import Conversation, Example
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.inference import Buckets, PromptError, PromptTooLong, user_turn

# The errors that a damaged file or an unusual text can cause outside the checks that raise SkipRecord.
_PREPARATION_ERRORS = DECODE_ERRORS
_UNUSABLE: tuple[type[Exception], ...] = (SkipRecord, *DECODE_ERRORS)


def conversation_of(processor: Processor, benchmark: Benchmark, item: Item) -> Conversation:
    """Builds the conversation that asks an item in the model's chat format.

    Raises:
        SkipRecord: The prompt is not valid Unicode, or its placeholders do not match the item's images.
    """
    if item.turns:
        return Conversation(item.id, item.turns, item.images)
    text = benchmark.prompt(item)
    check_text(text, "The prompt")
    content = place_images([text], len(item.images))[0] if benchmark.has_placeholders else (text,)
    try:
        turn = user_turn(content, len(item.images), processor.encoder.separators)
    except PromptError as error:
        raise SkipRecord("image_count", str(error)) from error
    return Conversation(item.id, (turn,), item.images)


def prompt_of(processor: Processor, benchmark: Benchmark, item: Item) -> Example:
    """Returns the tokenised prompt of an item with its tiles.

    Raises:
        SkipRecord: The item cannot be asked, e.g. because an image cannot be read.
    """
    return processor.prompt(conversation_of(processor, benchmark, item))


def prompt_size(processor: Processor, benchmark: Benchmark, item: Item) -> tuple[int, int]:
    """Computes the size of an item's prompt from the headers of its images, without decoding them.

    Returns:
        The number of tokens, vision tokens included, and the number of tiles. For an item that cannot be asked it is
        (0, 0); the preparation of the item then reports why.
    """
    if item.problem is not None:
        return 0, 0
    try:
        conversation = conversation_of(processor, benchmark, item)
        text = processor.encoder.prompt(conversation.turns)
        with ExitStack() as stack:
            opened = [stack.enter_context(open_image(image, max_pixels=processor.max_pixels)) for image in item.images]
            sizes = [size_of(image, rotate=processor.rotate) for image in opened]
        layouts = processor.layouts(sizes)
    except _UNUSABLE:
        return 0, 0
    return len(text.tokens) + sum(len(one.cell) - 1 for one in layouts), sum(one.tiles for one in layouts)


def batches(sizes: Mapping[int, tuple[int, int]], buckets: Buckets, rows: int) -> list[list[int]]:
    """Groups items into batches of the same length bucket, as far as possible.

    The largest prompts come first. So a lack of memory shows at once, and the estimate of the remaining time does not
    grow.

    Args:
        sizes: The number of tokens and of tiles of each prompt, by the number of the item.
        buckets: The static sizes that prompts are padded to.
        rows: The number of items in a batch.

    Returns:
        The numbers of the items of each batch.
    """

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
    """Prepares the prompts of each batch in threads, while the device works on the batch before.

    Args:
        processor: The processor of the model.
        benchmark: The benchmark of the items.
        items: All items.
        batches: The numbers of the items of each batch.
        workers: The number of threads. By default there is one for each core, at most 16.
        ahead: The number of batches that are prepared in advance.

    Yields:
        For each batch, by the number of the item, the prompt, or "<reason>: <detail>" for an item that cannot be asked.
    """

    def prepare(number: int) -> Example | str:
        item = items[number]
        if item.problem is not None:
            return item.problem
        try:
            return prompt_of(processor, benchmark, item)
        except SkipRecord as error:
            return str(error)
        except _PREPARATION_ERRORS as error:
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
