"""A TensorFlow Datasets builder that writes conversations as array_record files; tensorflow is not needed.

Images are stored as the encoded bytes they came in, so that nothing is decoded or compressed twice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from vr_jax.data.images import open_image
from vr_jax.data.skips import SkipRecord, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Skip

RECORDS_PER_SHARD = 1024  # TFDS holds one shard in memory while it writes it: some 100 MiB of images


class LlavaConversations(tfds.core.ShardBasedBuilder):
    """One split per source, its usable records in their order.

    Shard by shard: the builder that shuffles needs tensorflow for sets above 1 GiB, and training shuffles anyway.
    sources: split name -> source. max_skipped: share of unusable records above which TooManySkips is raised.
    With Apache Beam (in_beam=True, `tfds.download.DownloadConfig(beam_runner=...)`) each shard is a work item."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        sources: Mapping[str, Source],
        max_skipped: float = 0.01,
        records_per_shard: int = RECORDS_PER_SHARD,
        in_beam: bool = False,
        **kwargs: Any,
    ):
        self.sources = dict(sources)
        self.max_skipped = max_skipped
        self.records_per_shard = records_per_shard
        self.in_beam = in_beam
        self.skips: list[Skip] = []  # what was left out; Beam's workers only log it
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about images in LLaVA's schema, images as encoded files.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
                    "conversations": tfds.features.Sequence(
                        {"from": tfds.features.Text(), "value": tfds.features.Text()}
                    ),
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[_Shard]]:
        step = self.records_per_shard
        report = None if self.in_beam else self._report
        return {
            split: [_Shard(source, k, min(k + step, len(source)), report) for k in range(0, len(source), step)]
            for split, source in self.sources.items()
        }

    def _report(self, skip: Skip | None) -> None:
        self.progress.update()
        if skip is not None:
            self.skips.append(skip)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        total = sum(len(source) for source in self.sources.values())
        with tqdm.tqdm(total=total, unit="records", disable=self.in_beam) as self.progress:
            super()._download_and_prepare(dl_manager, download_config)
        for split, source in self.sources.items():  # TFDS removes what was written if this raises
            skipped = len(source) - self.info.splits[split].num_examples
            if skipped > self.max_skipped * len(source):
                names = summary(self.skips) or "Beam's logs name them"
                raise TooManySkips(f"split {split}: {skipped} of {len(source)} records cannot be used\n{names}")


@dataclasses.dataclass(frozen=True)
class _Shard:
    source: Source
    begin: int
    end: int
    report: Callable[[Skip | None], None] | None  # called for each record

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key in range(self.begin, self.end):
            row = row_of(self.source[key])
            if self.report is not None:
                self.report(row if isinstance(row, Skip) else None)
            if isinstance(row, Skip):
                logger.warning("skipped sample %s (%s): %s", row.id, row.reason, row.detail)
            else:
                yield key, row


def row_of(record: Conversation | Skip) -> dict[str, Any] | Skip:
    """A record as the builder's features, its images read; a Skip if one is absent or no image."""
    if isinstance(record, Skip):
        return record
    images = []
    try:
        for image in record.images:
            open_image(image).close()
            images.append(image.read_bytes() if isinstance(image, Path) else image)
    except SkipRecord as error:
        return error.as_skip(record.id)
    turns = [{"from": turn.role, "value": turn.text} for turn in record.turns]
    return {"id": record.id, "images": images, "conversations": turns}


@dataclasses.dataclass(frozen=True)
class Prepared:
    folder: Path
    records: int  # written, all splits together
    skips: list[Skip]  # left out; empty with Beam


def prepare(
    sources: Mapping[str, Source],
    directory: str | Path,
    *,
    max_skipped: float = 0.01,
    records_per_shard: int = RECORDS_PER_SHARD,
    in_beam: bool = False,
    beam_flags: Sequence[str] = (),
) -> Prepared:
    """Writes the sources as splits below `directory`.

    The folder appears when it is complete. beam_flags: Beam's command-line flags (runner, project, ...). With Beam
    the records left out are named in its workers' logs only.
    Raises TooManySkips, FileExistsError for a set that is already there, ModuleNotFoundError without Beam."""
    if in_beam and importlib.util.find_spec("apache_beam") is None:
        raise ModuleNotFoundError("apache_beam is not installed: pip install 'vr-jax[beam]'")
    builder = LlavaConversations(
        sources=sources,
        max_skipped=max_skipped,
        records_per_shard=records_per_shard,
        in_beam=in_beam,
        data_dir=str(directory),
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    target = Path(str(builder.data_dir))
    if target.exists():
        raise FileExistsError(f"{target} holds a prepared set already; remove it or choose another folder")
    config = tfds.download.DownloadConfig()
    if in_beam:
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

        options = PipelineOptions(list(beam_flags))
        runner = options.view_as(StandardOptions).runner or "DirectRunner"
        config = dataclasses.replace(config, beam_options=options, beam_runner=runner)
    builder.download_and_prepare(download_config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    return Prepared(target, sum(info.num_examples for info in builder.info.splits.values()), builder.skips)
