"""The training iterator: samples are shuffled, divided among processes, prepared in workers, packed into batches.

Grain reads the sequence of samples. Packing happens behind it in the main process, so the batches do not depend on the
number of workers. The state of the iterator is the position in the sequence and the positions of the examples that the
packer still holds. Preparing a sample is deterministic, so these examples are prepared again on resume instead of being
saved.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Collection, Generator
from typing import Any

import grain

from vr_jax.data.collate import collate
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.preparing import PrepareSample, indexed, prepared_samples
from vr_jax.data.processor import Processor
from vr_jax.data.shuffle import BlockShuffle
from vr_jax.data.skips import CHECK_COMMAND, SkipStatistics, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import HostBatch, Skip
from vr_jax.errors import UserError
from vr_jax.model.batch import BatchShape

STATE_VERSION = 2
TELL_SECONDS = 10.0  # after which a batch that is not ready yet is told of


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
    max_skipped: float = 1.0,
) -> TrainIterator:
    """Makes an iterator over training batches. The caller closes it after use with `iterator.close()`.

    Args:
        source: The samples.
        processor: Prepares a sample.
        shape: The sizes of a batch on this process.
        seed: The seed of the shuffling, in 0..2**32-1. Every epoch has its own order.
        num_epochs: The number of passes over the samples; None continues without end. A finite iteration ends with
            batches that are padded with empty rows, and then the numbers of batches of two processes may differ by one.
        shuffle: Whether the samples are shuffled.
        packing: Whether a row may hold several samples.
        num_workers: The number of processes that prepare samples; 0 prepares them in threads of this process.
        process_index: The index of this process, which takes every `process_count`-th sample.
        process_count: The number of processes that share the samples.
        skip_first: The number of samples of this process to pass over at the start.
        lookahead: The number of samples beyond a full batch to choose from when packing; by default 16 plus twice the
            number of rows.
        prefetch_batches: The number of batches that are made ahead.
        max_skipped: The share of unusable samples above which the next batch raises `TooManySkips`, by the rule of
            `vr_jax.data.skips`. It applies to each sample as it comes, and to each whole epoch.

    Returns:
        The iterator. `get_state()` is a small JSON-safe dictionary, and `set_state()` of another iterator with the same
        arguments continues bit for bit; only `num_workers` and `prefetch_batches` may differ. Samples that cannot be
        used are in `HostBatch.skipped` of the next batch. If not one sample of a whole epoch can be used, the next
        batch raises `TooManySkips`, whatever `max_skipped` is.

    Raises:
        UserError: The source has no samples.
        ValueError: `process_index` is not below `process_count`.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}: expected 0..{process_count - 1}")
    if not len(source):
        raise UserError(f"{source!r} has no samples; check the path and the split of the data.")
    samples: grain.MapDataset = grain.MapDataset.source(source)
    blocks = getattr(source, "blocks", None)
    if shuffle and blocks is not None:
        samples = BlockShuffle(samples, blocks=blocks, seed=seed)
    elif shuffle:
        samples = samples.shuffle(seed=seed)
    samples = samples.repeat(num_epochs)[process_index::process_count]
    elements = samples.map(PrepareSample(processor.limited_to(shape)))
    if lookahead is None:
        lookahead = 16 + 2 * shape.rows if packing else 1
    identity = {
        **dataclasses.asdict(shape),
        **{
            "samples": getattr(source, "lengths", len(source)),
            "seed": seed,
            "shuffle": shuffle,
            "packing": packing,
            "lookahead": lookahead,
        },
        **{"process_index": process_index, "process_count": process_count},
    }
    batches = _BatchIterator(
        elements,
        RowPacker(shape, packing=packing, lookahead=lookahead),
        start=skip_first,
        epoch=-(-len(source) // process_count),
        max_skipped=max_skipped,
        num_workers=num_workers,
        optional=processor.config.batch_fields,
        identity=identity,
    )
    return TrainIterator(batches, prefetch_batches)


class TrainIterator(grain.experimental.ThreadPrefetchDatasetIterator[HostBatch]):
    """Makes batches ahead in a thread. Its state is the state behind the last batch that it returned.

    Unlike Grain's iterators it also closes without messages if a program ends without closing it.
    """

    def __init__(self, parent: grain.DatasetIterator[HostBatch], prefetch_batches: int):
        """Prefetches batches of `parent`."""
        super().__init__(parent, prefetch_batches)
        weakref.finalize(self, _close_if_alive, weakref.ref(self))

    def close(self) -> None:
        """Stops the thread and the workers. Closing twice is allowed."""
        if not self._closed:
            super().close()


def _close_if_alive(reference: weakref.ref[grain.DatasetIterator]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


class _BatchIterator(grain.DatasetIterator[HostBatch]):
    """Packs prepared samples into batches, and stops where too many of them cannot be used.

    After `epoch` skipped samples in a row no usable sample is expected any more.
    """

    def __init__(
        self,
        elements: grain.MapDataset,
        packer: RowPacker,
        *,
        start: int,
        epoch: int,
        max_skipped: float,
        num_workers: int,
        optional: Collection[str],
        identity: dict[str, Any],
    ):
        super().__init__()
        self._elements = elements
        self._packer = packer
        self._next_element = min(start, len(elements))
        self._epoch = epoch
        self._statistics = SkipStatistics(max_skipped)
        self._skipped_before = 0  # the number of skipped samples when this epoch began
        self._num_workers = num_workers
        self._optional = optional
        self._identity = identity
        self._reader: Generator[IndexedExample | Skip] | None = None

    def __next__(self) -> HostBatch:
        self._assert_not_closed()
        skipped: list[Skip] = []
        told = time.monotonic()
        while not self._packer.complete and self._next_element < len(self._elements):
            element = self._read()
            if isinstance(element, IndexedExample):
                self._packer.offer(element)
                self._statistics.used += 1
            else:
                skipped.append(element)
                self._statistics.add(element)
                self._statistics.check()
            self._check_epoch()
            if len(skipped) >= self._epoch and not self._packer.pending():
                break
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                self._tell()
        if not self._packer.pending():
            # No skip is lost here, because a batch is taken only while other examples wait, or at the end.
            if skipped:
                raise TooManySkips(
                    f"None of {len(skipped)} samples could be used; repair the data, {CHECK_COMMAND}.\n"
                    f"{summary(self._statistics.examples.values(), self._statistics.counts)}"
                )
            raise StopIteration
        rows = self._packer.take()
        return collate(rows, self._packer.shape, skipped=skipped, optional=self._optional)

    def _check_epoch(self) -> None:
        """Compares the share of skipped samples of an epoch with its limit exactly once the epoch is over."""
        if self._next_element % self._epoch:
            return
        skipped = self._statistics.skipped - self._skipped_before
        self._skipped_before = self._statistics.skipped
        if skipped > self._statistics.max_fraction * self._epoch:
            self._statistics.refuse()

    def _tell(self) -> None:
        """Says why there is no batch yet: preparing the samples takes long, or many of them cannot be used."""
        logger.warning(
            "Still preparing a batch: %d samples used and %d skipped so far%s",
            self._statistics.used,
            self._statistics.skipped,
            "".join(f"; {reason} {count}" for reason, count in self._statistics.counts.most_common(3)),
        )

    def _read(self) -> IndexedExample | Skip:
        """Returns the next prepared sample."""
        if self._reader is None:
            self._reader = prepared_samples(self._elements, self._next_element, self._num_workers, self._packer.shape)
        element = next(self._reader)
        self._next_element += 1
        return element

    def get_state(self) -> dict[str, Any]:
        pending = [indexed.index for indexed in self._packer.pending()]
        statistics = self._statistics
        return {
            "version": STATE_VERSION,
            "next": self._next_element,
            "pending": pending,
            "skips": {
                "used": statistics.used,
                "counts": dict(statistics.counts),
                "before_epoch": self._skipped_before,
            },
            "identity": self._identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: The state is that of an iterator with other arguments or over other data.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"The saved state of the data iterator has version {state.get('version')}, but this program reads "
                f"version {STATE_VERSION}; start the run anew."
            )
        saved = state["identity"]
        differing = [
            f"{name}: saved {saved.get(name)!r}, now {self._identity.get(name)!r}"
            for name in sorted({*saved, *self._identity})
            if saved.get(name) != self._identity.get(name)
        ]
        if differing:
            raise UserError(
                f"The saved state of the data iterator belongs to other settings ({'; '.join(differing)}); restore "
                "these settings, or start the run anew."
            )
        self._close_reader()
        self._next_element = state["next"]
        skips = state["skips"]
        self._statistics = SkipStatistics(self._statistics.max_fraction, skips["used"], Counter(skips["counts"]))
        self._skipped_before = skips["before_epoch"]
        self._packer.clear()
        for index in state["pending"]:
            element = indexed(index, self._elements[index])
            if isinstance(element, Skip):
                raise UserError(
                    f"The sample {element.id} could be used when the state was saved, but not any more: "
                    f"{element.detail} Restore the data, or start the run anew."
                )
            self._packer.offer(element)

    def close(self) -> None:
        self._close_reader()
        super().close()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __str__(self) -> str:
        return "vr_jax batches"
