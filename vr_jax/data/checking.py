"""Checks a whole data set without training: which records can be used, how long they are, and how full rows become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from vr_jax.data.images import decode_rgb, open_image
from vr_jax.data.packing import CANDIDATES, fill_row
from vr_jax.data.preparing import reading
from vr_jax.data.processor import Processor, check_room
from vr_jax.data.skips import SkipRecord, SkipStatistics, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Skip
from vr_jax.model.batch import BatchShape

MEASURES = ("images", "tokens", "targets", "tiles")  # what is measured of a sample
PERCENTILES = (0, 10, 50, 90, 99, 99.9, 100)
PACKED = 20_000  # samples that the filling of rows is estimated from, drawn at random


@dataclass(frozen=True)
class Filling:
    """An estimate of how full the rows of the batches are, from samples packed in random order.

    Attributes:
        tokens: The share of the token slots that samples use.
        tiles: The share of the tile slots that samples use.
        samples_per_row: The mean number of samples in a row.
    """

    tokens: float
    tiles: float
    samples_per_row: float


@dataclass
class DataReport:
    """The result of a check: the counts and lengths of the records of a data set.

    Attributes:
        source: The source in words.
        records: The number of records.
        statistics: The counts of used and skipped records, with examples.
        lengths: For each of `MEASURES` the values of all usable samples. Without a processor only the images.
        shape: The sizes of a row that samples must fit into, or None.
        filling: How full the rows are, or None if that is not known.
        first: The positions of the first usable records.
    """

    source: str
    records: int
    statistics: SkipStatistics
    lengths: dict[str, Int[np.ndarray, " n"]] = field(default_factory=dict)
    shape: BatchShape | None = None
    filling: Filling | None = None
    first: list[int] = field(default_factory=list)

    @property
    def acceptable(self) -> bool:
        """Whether the share of records that cannot be used is within the limit."""
        return self.statistics.skipped <= self.statistics.max_fraction * self.records

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        one = self.statistics
        verdict = "within" if self.acceptable else "above"
        lines = [
            self.source,
            f"{self.records} records: {one.used} can be used, {one.skipped} cannot ({one.fraction:.2%}, {verdict} the "
            f"limit of {one.max_fraction:.2%}, max_skipped)",
        ]
        if one.counts:
            lines += summary(one.examples.values(), one.counts).splitlines()
        if one.used:
            lines.append("          " + "".join(f"{_percentile(p):>10}" for p in PERCENTILES))
            for name, values in self.lengths.items():
                numbers = np.percentile(values, PERCENTILES, method="higher")
                lines.append(f"{name:<10}" + "".join(f"{number:>10}" for number in numbers))
        if self.filling is not None and self.shape is not None:
            lines.append(
                f"a row of batch.tokens={self.shape.tokens} and batch.tiles={self.shape.tiles} holds "
                f"{self.filling.samples_per_row:.1f} samples, which use {self.filling.tokens:.1%} of its token slots "
                f"and {self.filling.tiles:.1%} of its tile slots"
            )
        return lines


def _percentile(value: float) -> str:
    return "min" if value == 0 else "max" if value == 100 else f"{value:g} %"


@dataclass(frozen=True)
class _Measure:
    """Prepares a record as for training and returns its measures, or the Skip that says why it cannot be used."""

    processor: Processor | None

    def __call__(self, record: Conversation | Skip) -> Int[np.ndarray, " measures"] | Skip:
        if isinstance(record, Skip):
            return record
        images = len(record.images)
        try:
            if self.processor is None:
                for image in record.images:
                    with open_image(image) as opened:
                        decode_rgb(opened)
                return np.asarray([images])
            example = self.processor.example(record)
        except SkipRecord as error:
            return error.as_skip(record.id)
        return np.asarray([images, len(example.tokens), example.loss_mask.sum(), len(example.tile_pixels)])


def check_source(
    source: Source,
    processor: Processor | None = None,
    shape: BatchShape | None = None,
    *,
    max_skipped: float = 0.01,
    packing: bool = True,
    samples: int = 20,
    num_workers: int = 0,
    on_record: Callable[[], object] = lambda: None,
) -> DataReport:
    """Reads every record once, decodes its images, and prepares it as training would.

    Args:
        source: The records.
        processor: Prepares a sample. Without one, only the records and their images are checked.
        shape: The sizes of a row. Samples that do not fit are counted as skipped, but their lengths are reported.
        max_skipped: The share of unusable records above which the report is not acceptable.
        packing: Whether a row may hold several samples.
        samples: The number of usable records whose positions are kept.
        num_workers: The number of processes that prepare samples; 0 takes threads.
        on_record: Is called after each record, to show the progress.
    """
    statistics = SkipStatistics(max_skipped)
    report = DataReport(repr(source), len(source), statistics, shape=shape)
    measures = MEASURES if processor is not None else MEASURES[:1]
    found: list[Int[np.ndarray, " measures"]] = []
    fitting: list[tuple[int, int]] = []
    elements = grain.MapDataset.source(source).map(_Measure(processor))
    reader: Any = iter(reading(elements, num_workers))
    try:
        for index, element in enumerate(reader):
            skip = element if isinstance(element, Skip) else None
            if skip is None:
                measured = np.asarray(element)
                found.append(measured)
                if processor is not None and shape is not None:
                    skip = _unfit(source, index, int(measured[1]), int(measured[3]), shape)
                    if skip is None:
                        fitting.append((int(measured[1]), int(measured[3])))
            if skip is not None:
                statistics.add(skip)
            else:
                statistics.used += 1
                if len(report.first) < samples:
                    report.first.append(index)
            on_record()
    finally:
        reader.close()
    table = np.asarray(found, np.int64).reshape(-1, len(measures))
    report.lengths = {name: table[:, k] for k, name in enumerate(measures)}
    if fitting and shape is not None:
        report.filling = filling_of(fitting, shape, packing=packing)
    return report


def _unfit(source: Source, index: int, tokens: int, tiles: int, shape: BatchShape) -> Skip | None:
    """Returns the Skip of a sample that does not fit into a row, or None."""
    try:
        check_room(tokens, tiles, shape.tokens, shape.tiles)
    except SkipRecord as error:
        return error.as_skip(source[index].id)
    return None


def filling_of(sizes: list[tuple[int, int]], shape: BatchShape, *, packing: bool = True) -> Filling:
    """Estimates how full rows are, by packing at most `PACKED` of the samples in random order.

    Args:
        sizes: The numbers of tokens and of tiles of samples that fit into a row.
        shape: The sizes of a row.
        packing: Whether a row may hold several samples.
    """
    order = np.random.default_rng(0).permutation(len(sizes))[:PACKED]
    waiting = [sizes[k] for k in order]
    candidates = CANDIDATES if packing else 1
    whole = len(waiting) >= 2 * candidates  # the last rows of few candidates are emptier than those of a long run
    rows, used = 0, np.zeros(3)
    while waiting and (len(waiting) >= candidates or not whole):
        chosen = fill_row(waiting[:candidates], shape.tokens, shape.tiles)
        used += [*np.sum([waiting[k] for k in chosen], axis=0), len(chosen)]
        rows += 1
        for k in reversed(chosen):
            del waiting[k]
    tokens, tiles, samples = used / rows
    return Filling(tokens / shape.tokens, tiles / shape.tiles, samples)
