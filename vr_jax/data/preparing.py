"""Samples are prepared ahead, in threads or in worker processes, and come in their order."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from absl import flags

from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord, logger
from vr_jax.data.types import Conversation, Example, Skip
from vr_jax.model.batch import BatchShape

SHARED_MEMORY = "/dev/shm"
# Sending a smaller array through the pipe is cheaper than creating a file of shared memory for it.
MIN_SHARED_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class PrepareSample:
    """Turns a record into a dictionary of arrays, which Grain can pass through shared memory, or into a Skip.

    Attributes:
        processor: Prepares a sample.
    """

    processor: Processor

    def __call__(self, record: Conversation | Skip) -> dict[str, Any] | Skip:
        """Returns the fields of the example by name, or why the record cannot be used."""
        if isinstance(record, Skip):
            return record
        try:
            example = self.processor.example(record)
        except SkipRecord as error:
            return error.as_skip(record.id)
        return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}


def prepared_samples(
    elements: grain.MapDataset, start: int, num_workers: int, shape: BatchShape
) -> Generator[Example | Skip]:
    """Yields what `PrepareSample` made of the samples, in order; closing the generator ends threads and workers.

    Args:
        elements: The prepared samples.
        start: The index of the first one that is read.
        num_workers: The number of processes that prepare samples; 0 takes threads of this process.
        shape: The sizes of a row of a batch.
    """
    if start >= len(elements):
        return
    reader = iter(reading(elements[start:], num_workers, shape))
    try:
        for element in reader:
            if num_workers and not isinstance(element, Skip):
                # The copy frees the shared memory at once, so that it holds only what is between the processes.
                element["tile_pixels"] = np.array(element["tile_pixels"])
            yield as_example(element)
    finally:
        reader.close()


def as_example(element: dict[str, Any] | Skip) -> Example | Skip:
    """Undoes what `PrepareSample` did to an example."""
    return element if isinstance(element, Skip) else Example(**element)


def reading(elements: grain.MapDataset, num_workers: int, shape: BatchShape | None = None) -> grain.IterDataset:
    """Prepares elements ahead, in order, in threads of this process or in worker processes.

    Args:
        elements: What is prepared.
        num_workers: The number of processes; 0 takes threads of this process.
        shape: The sizes of a row of a batch, which bound the tiles of an element; None if elements hold no tiles.
    """
    if num_workers == 0:
        return elements.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if not flags.FLAGS.is_parsed():
        # Grain reads flags of its own, which a notebook, a test or a command without absl has not parsed.
        flags.FLAGS.mark_as_parsed()
    buffered = 4
    dataset = elements.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    largest = shape.tiles * shape.tile_size**2 * 3 if shape is not None else 0
    needed = 2 * largest * num_workers * (buffered + 1)
    options = grain.experimental.DatasetOptions(
        min_shm_size=MIN_SHARED_BYTES if _shared_memory_holds(needed) else 1 << 62
    )
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options=options)
    return dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=buffered),
        worker_init_fn=_start_worker,
    )


def _shared_memory_holds(needed: int) -> bool:
    """Checks the free shared memory, because a worker that writes past its end is killed."""
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else needed
    if free < needed:
        logger.warning(
            "%s has %.1f GiB free, but up to %.1f GiB may be needed, so images go through pipes, which is slower. "
            "In docker, enlarge it with --shm-size.",
            SHARED_MEMORY,
            free / 2**30,
            needed / 2**30,
        )
    return free >= needed


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process: it ignores signals to the process group, and it ends with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The workers already run in parallel.
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
