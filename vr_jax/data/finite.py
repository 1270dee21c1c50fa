"""A finite iteration over a source, exact over all processes: every sample once, in the order of the source."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Self

import grain

from vr_jax import distributed
from vr_jax.data.collate import collate
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.preparing import PrepareSample, prepared_samples
from vr_jax.data.processor import Processor
from vr_jax.data.sources import Source
from vr_jax.data.types import Example, HostBatch, Skip
from vr_jax.model.batch import BatchShape


def make_finite_iterator(
    source: Source,
    processor: Processor,
    shape: BatchShape,
    *,
    packing: bool = True,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
    any_process: Callable[[bool], bool] | None = None,
) -> FiniteIterator:
    """Makes an iterator that gives every sample of a source once, for a mean over a held-out source.

    All processes get the same number of batches. Whether there is another one is agreed upon by all of them, in every
    call of `next`, because the number of rows that samples fill is known only when they are prepared. A process whose
    samples end before those of the others gets batches of empty rows, without any segment.

    Args:
        source: The samples.
        processor: Prepares a sample.
        shape: The sizes of a batch on this process.
        packing: Whether a row may hold several samples.
        num_workers: The number of processes that prepare samples; 0 prepares them in threads of this process.
        process_index: The index of this process, which takes every `process_count`-th sample.
        process_count: The number of processes that share the samples. All of them iterate together.
        max_batches: The number of batches after which the iteration ends; None reads all samples. How many samples
            these batches hold depends on packing, and so on the number of processes.
        any_process: Returns on every process whether the argument is True on any of them; by default they tell one
            another through `vr_jax.distributed.gather`.

    Returns:
        The iterator, which the caller closes if it leaves it before its end. Samples that cannot be used are in
        `HostBatch.skipped`; they do not end the iteration, so the caller decides how many of them are too many.

    Raises:
        ValueError: `process_index` is not below `process_count`.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}: expected 0..{process_count - 1}")
    if any_process is None:
        any_process = _any_process if process_count > 1 else bool
    mine = grain.MapDataset.source(source)[process_index::process_count]
    samples = prepared_samples(mine.map(PrepareSample(processor.limited_to(shape))), 0, num_workers, shape)
    packer = RowPacker(shape, packing=packing, lookahead=16 + 2 * shape.rows if packing else 1)
    return FiniteIterator(samples, packer, processor.config.batch_fields, max_batches, any_process)


class FiniteIterator(Iterator[HostBatch]):
    """Packs the samples of this process into batches, as many as the process with the most of them has."""

    def __init__(
        self,
        samples: Generator[Example | Skip],
        packer: RowPacker,
        optional: frozenset[str],
        max_batches: int | None,
        any_process: Callable[[bool], bool],
    ):
        """Prepares the iteration; nothing is read before the first batch is asked for.

        Args:
            samples: The prepared samples of this process.
            packer: An empty packer.
            optional: The optional fields of the batches.
            max_batches: The number of batches after which the iteration ends.
            any_process: Returns on every process whether the argument is True on any of them.
        """
        self._samples, self._packer, self._optional = samples, packer, optional
        self._left, self._any_process = max_batches, any_process
        self._ended = False

    def __next__(self) -> HostBatch:
        """Returns this process's rows of the next batch, which are empty where only other processes have samples.

        Raises:
            StopIteration: No process has samples left.
        """
        if self._ended or self._left == 0:
            self.close()
            raise StopIteration
        rows, skipped = self._rows()
        if not self._any_process(bool(rows or skipped)):
            self.close()
            raise StopIteration
        if self._left is not None:
            self._left -= 1
        return collate(rows, self._packer.shape, skipped=skipped, optional=self._optional)

    def _rows(self) -> tuple[list[list[Example]], list[Skip]]:
        """Returns the rows of the next batch of this process, and the samples that were skipped on the way."""
        skipped: list[Skip] = []
        while not self._packer.complete and (sample := next(self._samples, None)) is not None:
            if isinstance(sample, Skip):
                skipped.append(sample)
            else:
                self._packer.offer(IndexedExample((0, 0), sample))  # Nobody asks for its place.
        return self._packer.take() if self._packer.pending() else [], skipped

    def close(self) -> None:
        """Ends the threads and processes that read ahead. Closing twice is allowed."""
        self._ended = True
        self._samples.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def _any_process(mine: bool) -> bool:
    return any(distributed.gather(mine))
