"""The training iterator: samples are shuffled, divided among processes, prepared in workers, packed into batches.

Grain reads the sequence of samples. Packing happens behind it in the main process, so the batches do not depend on the
number of workers. The state of the iterator is how far this process is in the sequence that all processes share
(`vr_jax.data.mixture`), and the places of the examples that the packer still holds. Preparing a sample is
deterministic, so these examples are prepared again on resume instead of being saved.
"""

from __future__ import annotations

import dataclasses
import json
import time
import weakref
from collections import Counter
from collections.abc import Collection, Generator, Sequence
from typing import Any

import grain

from vr_jax.data.collate import collate
from vr_jax.data.elastic import STATE_VERSION, check_state, dealt, places_of
from vr_jax.data.mixture import OwnPlaces, PlacedSamples, mixture_of, streams_of
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.preparing import PrepareSample, as_example, prepared_samples
from vr_jax.data.processor import Processor
from vr_jax.data.skips import CHECK_COMMAND, SkipStatistics, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Example, HostBatch, Skip
from vr_jax.errors import UserError
from vr_jax.model.batch import SOURCES, BatchShape

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
    allow_other_weights: bool = False,
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
        allow_other_weights: Whether `set_state` takes a state of other weights or shares of the sources. Each source
            then goes on from where it was.

    Returns:
        The iterator. `get_state()` is a small JSON-safe dictionary, and `set_state()` of another iterator with the same
        arguments continues bit for bit; only `num_workers` and `prefetch_batches` may differ. `set_state()` also takes
        the list of the states of all processes. If those were another number, which shared as many rows, their samples
        are dealt to the processes that continue (`vr_jax.data.elastic`). Samples that cannot be used are in
        `HostBatch.skipped` of the next batch. If not one sample of a whole epoch can be used, the next batch raises
        `TooManySkips`, whatever `max_skipped` is.

    Raises:
        UserError: The source has no samples.
        ValueError: `process_index` is not below `process_count`.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}: expected 0..{process_count - 1}")
    if not len(source):
        raise UserError(f"{source!r} has no samples; check the path and the split of the data.")
    mixture = mixture_of(source, seed, shuffle=shuffle)
    end = None if num_epochs is None else num_epochs * mixture.epoch
    prepare = PrepareSample(processor.limited_to(shape))
    identity = {
        **dataclasses.asdict(dataclasses.replace(shape, rows=shape.rows * process_count)),
        **{"samples": getattr(source, "lengths", len(source)), "counts": getattr(source, "counts", None), "end": end},
        **{"seed": seed, "shuffle": shuffle, "packing": packing, "lookahead": lookahead},
    }
    if lookahead is None:
        lookahead = 16 + 2 * shape.rows if packing else 1
    names = getattr(source, "names", ())
    batches = _BatchIterator(
        [stream.map(prepare) for stream in streams_of(source, seed, shuffle=shuffle)],
        OwnPlaces(mixture, (), 0, process_index, process_count, end),
        RowPacker(shape, packing=packing, lookahead=lookahead),
        start=skip_first,
        max_skipped=max_skipped,
        num_workers=num_workers,
        optional={*processor.config.batch_fields, *([SOURCES] if len(names) > 1 else [])},
        identity=json.loads(json.dumps(identity)),
        allow_other_weights=allow_other_weights,
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

    After as many skipped samples in a row as this process has of an epoch, no usable sample is expected any more.
    """

    def __init__(
        self,
        streams: Sequence[grain.MapDataset],
        own: OwnPlaces,
        packer: RowPacker,
        *,
        start: int,
        max_skipped: float,
        num_workers: int,
        optional: Collection[str],
        identity: dict[str, Any],
        allow_other_weights: bool,
    ):
        super().__init__()
        self._streams = streams
        self._mixture = own.mixture  # as the settings have it, from its beginning
        self._packer = packer
        self._epoch = -(-own.mixture.epoch // own.process_count)
        self._statistics = SkipStatistics(max_skipped)
        self._num_workers = num_workers
        self._optional = optional
        self._identity = identity
        self._allow_other_weights = allow_other_weights
        self._reader: Generator[Example | Skip] | None = None
        self._start_at(own, min(start, len(own)))

    def _start_at(self, own: OwnPlaces, index: int) -> None:
        """Reads the samples of other places, from an index on."""
        self._close_reader()
        self._own, self._next_element = own, index
        self._elements = PlacedSamples(self._streams, own)
        # The samples and the skipped ones since the share of an epoch was looked at.
        self._epoch_read, self._epoch_skipped = index % self._epoch, 0
        self._packer.clear()

    def __next__(self) -> HostBatch:
        self._assert_not_closed()
        skipped: list[Skip] = []
        told = time.monotonic()
        while not self._packer.complete and self._next_element < len(self._elements):
            place, element = self._own.place(self._next_element), self._read()
            self._epoch_read += 1
            if isinstance(element, Example):
                self._packer.offer(IndexedExample(place, element))
                self._statistics.used += 1
            else:
                skipped.append(element)
                self._epoch_skipped += 1
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
        if self._epoch_read < self._epoch:
            return
        skipped, self._epoch_read, self._epoch_skipped = self._epoch_skipped, 0, 0
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

    def _read(self) -> Example | Skip:
        """Returns the next prepared sample."""
        if self._reader is None:
            self._reader = prepared_samples(self._elements, self._next_element, self._num_workers, self._packer.shape)
        element = next(self._reader)
        self._next_element += 1
        return element

    def get_state(self) -> dict[str, Any]:
        own, statistics = self._own, self._statistics
        behind = self._next_element >= len(own.left)
        return {
            "version": STATE_VERSION,
            "process": [own.process_index, own.process_count],
            "first": list(own.mixture.first),
            "base": own.base,
            "left": [] if behind else list(own.left),
            "next": self._next_element - len(own.left) if behind else self._next_element,
            "pending": [list(waiting.place) for waiting in self._packer.pending()],
            "skips": {
                "used": statistics.used,
                "counts": dict(statistics.counts),
                "epoch": [self._epoch_read, self._epoch_skipped],
            },
            "identity": self._identity,
        }

    def set_state(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Continues from a state of this process, or from the states of all processes of a run, however many.

        Raises:
            UserError: The state is that of an iterator with other arguments or over other data.
        """
        own, states = self._own, state if isinstance(state, list) else [state]
        allow = self._allow_other_weights
        checked = [check_state(one, self._identity, allow_other_weights=allow) for one in states]
        reweighted = any(checked)
        mine = [one for one in states if one["process"] == [own.process_index, own.process_count]]
        if reweighted or not mine:
            saved = dealt(
                states,
                self._mixture,
                self._identity,
                process_index=own.process_index,
                process_count=own.process_count,
                reweighted=reweighted,
            )
            if reweighted:
                logger.info("the sources go on with other rates, behind %d samples that waited", len(saved["left"]))
            else:
                logger.info(
                    "the samples of %d processes are dealt to %d, and %d of them wait for this process",
                    *(len(states), own.process_count, len(saved["left"])),
                )
        else:
            (saved,) = mine
        self._continue(saved)

    def _continue(self, saved: dict[str, Any]) -> None:
        """Continues from a state of this process."""
        own = places_of(saved, self._mixture, self._identity["end"])
        self._start_at(own, saved["next"])
        skips = saved["skips"]
        self._statistics = SkipStatistics(self._statistics.max_fraction, skips["used"], Counter(skips["counts"]))
        self._epoch_read, self._epoch_skipped = skips["epoch"]
        for stream, inner in saved["pending"]:
            element = as_example(self._streams[stream][inner])
            if isinstance(element, Skip):
                raise UserError(
                    f"The sample {element.id} could be used when the state was saved, but not any more: "
                    f"{element.detail} Restore the data, or start the run anew."
                )
            self._packer.offer(IndexedExample((stream, inner), element))

    def close(self) -> None:
        self._close_reader()
        super().close()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __str__(self) -> str:
        return "vr_jax batches"
