"""Source -> batches: shuffled, sharded by process, prepared in worker processes, packed, and resumable exactly.

Grain reads the stream of samples; packing happens behind it in the main process, so batches do not depend on the number
of workers. The iterator's state is the position in the stream and the positions of the examples that the packer
still holds: preparing a sample is deterministic, so they are prepared again on resume instead of being saved.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from typing import Any

import grain
import numpy as np
from absl import flags

from vr_jax.data.collate import collate
from vr_jax.data.packing import Arrival, RowPacker
from vr_jax.data.processor import Processor
from vr_jax.data.shuffle import BlockShuffle
from vr_jax.data.skips import SkipRecord, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Example, HostBatch, Skip
from vr_jax.model.batch import BatchShape

STATE_VERSION = 1
SHARED_MEMORY = "/dev/shm"
MIN_SHARED_BYTES = 1 << 16  # smaller arrays are cheaper to send through the pipe than as a file of shared memory


def make_train_iterator(
    source: Source,
    processor: Processor,
    shape: BatchShape,
    *,
    seed: int,
    num_epochs: int | None = None,
    shuffle: bool = True,
    packing: bool = True,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_first: int = 0,
    lookahead: int | None = None,
    prefetch_batches: int = 2,
) -> TrainIterator:
    """Iterates over batches of `shape` (sizes of one process). Close it after use: `iterator.close()`.

    seed: of the shuffling, in 0..2**32-1; epoch e has its own order. num_epochs: None goes on for ever; a finite
    iteration ends with partial batches, padded with empty rows, and processes may end one batch apart. packing: False
    puts one sample into each row. num_workers: processes that prepare samples (0: threads of this one). process_index,
    process_count: this process takes every process_count-th sample. skip_first: samples of this process to pass over.
    lookahead: samples to choose from beyond what a batch holds, default 16 + 2 rows. prefetch_batches: batches made
    ahead.

    `get_state()` is a small JSON-safe dict; `set_state()` of another iterator with the same arguments (num_workers and
    prefetch_batches may differ) continues bit for bit. Samples that cannot be used are in `HostBatch.skipped` of the
    next batch. Raises TooManySkips if not one sample of a whole epoch can be used."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}: expected 0..{process_count - 1}")
    if not len(source):
        raise ValueError(f"{source!r} has no samples")
    samples: grain.MapDataset = grain.MapDataset.source(source)
    blocks = getattr(source, "blocks", None)
    if shuffle and blocks is not None:
        samples = BlockShuffle(samples, blocks=blocks, seed=seed)
    elif shuffle:
        samples = samples.shuffle(seed=seed)
    samples = samples.repeat(num_epochs)[process_index::process_count]
    elements = samples.map(_Prepare(processor.limited_to(shape)))
    if lookahead is None:
        lookahead = 16 + 2 * shape.rows if packing else 1
    identity = {
        **dataclasses.asdict(shape),
        **{"samples": len(source), "seed": seed, "shuffle": shuffle, "packing": packing, "lookahead": lookahead},
        **{"process_index": process_index, "process_count": process_count},
    }
    batches = _BatchIterator(
        elements,
        RowPacker(shape, packing=packing, lookahead=lookahead),
        start=skip_first,
        patience=-(-len(source) // process_count),
        num_workers=num_workers,
        weighted_cells=processor.config.image.may_interpolate,
        identity=identity,
    )
    return TrainIterator(batches, prefetch_batches)


class TrainIterator(grain.experimental.ThreadPrefetchDatasetIterator[HostBatch]):
    """Makes batches ahead in a thread; its state is that behind the last batch it gave out.

    Also closes quietly when a program ends without closing it, which Grain's iterators do not."""

    def __init__(self, parent: grain.DatasetIterator[HostBatch], prefetch_batches: int):
        super().__init__(parent, prefetch_batches)
        weakref.finalize(self, _close_if_alive, weakref.ref(self))

    def close(self) -> None:
        if not self._closed:
            super().close()


def _close_if_alive(reference: weakref.ref[grain.DatasetIterator]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class _Prepare:
    """A record as a dict of arrays (which Grain can pass through shared memory), or as a Skip."""

    processor: Processor

    def __call__(self, record: Conversation | Skip) -> dict[str, Any] | Skip:
        if isinstance(record, Skip):
            return record
        try:
            example = self.processor.example(record)
        except SkipRecord as error:
            return error.as_skip(record.id)
        return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}


class _BatchIterator(grain.DatasetIterator[HostBatch]):
    """patience: skipped samples in a row after which nothing usable is expected any more."""

    def __init__(
        self,
        elements: grain.MapDataset,
        packer: RowPacker,
        *,
        start: int,
        patience: int,
        num_workers: int,
        weighted_cells: bool,
        identity: dict[str, Any],
    ):
        super().__init__()
        self._elements = elements
        self._packer = packer
        self._next_element = min(start, len(elements))
        self._patience = patience
        self._num_workers = num_workers
        self._weighted_cells = weighted_cells
        self._identity = identity
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> HostBatch:
        self._assert_not_closed()
        skipped: list[Skip] = []
        while not self._packer.complete and self._next_element < len(self._elements):
            arrival = self._read()
            if isinstance(arrival, Arrival):
                self._packer.offer(arrival)
                continue
            skipped.append(arrival)
            if len(skipped) >= self._patience and not self._packer.pending():
                break
        if not self._packer.pending():
            # No skip is lost: a batch is taken only while others wait, or after the whole stream was read.
            if skipped:
                raise TooManySkips(f"not one of {len(skipped)} samples could be used:\n{summary(skipped)}")
            raise StopIteration
        rows = self._packer.take()
        return collate(rows, self._packer.shape, skipped=skipped, weighted_cells=self._weighted_cells)

    def _read(self) -> Arrival | Skip:
        if self._reader is None:
            self._reader = iter(_reading(self._elements[self._next_element :], self._num_workers, self._packer.shape))
        element = next(self._reader)
        if self._num_workers and not isinstance(element, Skip):
            # Out of shared memory at once, so that only what is under way between the processes takes room there.
            element["tile_pixels"] = np.array(element["tile_pixels"])
        self._next_element += 1
        return _arrival(self._next_element - 1, element)

    def get_state(self) -> dict[str, Any]:
        pending = [arrival.index for arrival in self._packer.pending()]
        return {"version": STATE_VERSION, "next": self._next_element, "pending": pending, "identity": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of an iterator with other arguments or over other data."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"data iterator state of version {state.get('version')}, expected {STATE_VERSION}")
        saved = state["identity"]
        differing = [
            f"{name}: saved {saved.get(name)!r}, now {self._identity.get(name)!r}"
            for name in sorted({*saved, *self._identity})
            if saved.get(name) != self._identity.get(name)
        ]
        if differing:
            raise ValueError(f"the saved data iterator belongs to another input pipeline ({'; '.join(differing)})")
        self._close_reader()
        self._next_element = state["next"]
        self._packer.clear()
        for index in state["pending"]:
            arrival = _arrival(index, self._elements[index])
            if isinstance(arrival, Skip):
                raise ValueError(f"sample {arrival.id} was usable when the state was saved, now: {arrival.detail}")
            self._packer.offer(arrival)

    def close(self) -> None:
        self._close_reader()
        super().close()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __str__(self) -> str:
        return "vr_jax batches"


def _arrival(index: int, element: dict[str, Any] | Skip) -> Arrival | Skip:
    return element if isinstance(element, Skip) else Arrival(index, Example(**element))


def _reading(elements: grain.MapDataset, num_workers: int, shape: BatchShape) -> grain.IterDataset:
    """Prepares elements ahead, in order, with threads of this process or in worker processes."""
    if num_workers == 0:
        return elements.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, which nobody parsed in a notebook or a test
    buffered = 4
    dataset = elements.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    largest = shape.tiles * shape.tile_size**2 * 3
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
    """A worker that writes past the end of shared memory is killed, so it is used only where there is enough."""
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else needed
    if free < needed:
        logger.warning(
            "%s has %.1f GiB free, up to %.1f GiB may be needed: images go through pipes, which is slower "
            "(docker: --shm-size)",
            SHARED_MEMORY,
            free / 2**30,
            needed / 2**30,
        )
    return free >= needed


def _start_worker(index: int, count: int) -> None:
    """Signals to the process group are the main process's business, and no worker outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
