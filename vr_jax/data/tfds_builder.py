"""Writing of prepared sets: a TensorFlow Datasets builder whose files are array_record. It does not need tensorflow.

Images are stored as the encoded bytes that they came in, so that nothing is decoded or compressed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from vr_jax.data.images import open_image
from vr_jax.data.skips import SkipRecord, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, ImagePart, Skip, Turn
from vr_jax.errors import UserError
from vr_jax.failures import close_after
from vr_jax.storage import Path, UploadedFolder, as_path, file_errors, is_local, remove_empty_folders

# TFDS holds one shard in memory while it writes it, which is some 100 MiB of images with this number of records.
RECORDS_PER_SHARD = 1024


class LlavaConversations(tfds.core.ShardBasedBuilder):
    """Writes one split per source, with the usable records in their order.

    It writes shard by shard, because TFDS's shuffling builder needs tensorflow above 1 GiB, and training shuffles
    anyway. With Apache Beam each shard is a work item.

    Attributes:
        sources: The source of each split by name.
        max_skipped: The fraction of unusable records of a split above which nothing is written.
        records_per_shard: The number of records in a file.
        in_beam: Whether Apache Beam does the work.
        skips: The records that were left out. It stays empty with Beam, whose workers only log them.
        progress: The progress bar of the records.
    """

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
        """Stores the settings.

        Args:
            sources: The source of each split by name.
            max_skipped: The fraction of unusable records of a split above which nothing is written.
            records_per_shard: The number of records in a file.
            in_beam: Whether Apache Beam does the work.
            **kwargs: The arguments of the TFDS builder, such as `data_dir`.
        """
        self.sources = dict(sources)
        self.max_skipped = max_skipped
        self.records_per_shard = records_per_shard
        self.in_beam = in_beam
        self.skips: list[Skip] = []
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about images: encoded files, and messages as JSON.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
                    "messages": tfds.features.Text(),
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
        for split, source in self.sources.items():
            skipped = len(source) - self.info.splits[split].num_examples
            if skipped > self.max_skipped * len(source):
                # TFDS removes the written files when this is raised.
                names = summary(self.skips) or "The logs of Beam's workers name them."
                raise TooManySkips(
                    f"The split {split!r} has {skipped} records of {len(source)} that cannot be used, but at most "
                    f"{self.max_skipped:.2%} are allowed. Repair these records, or allow a larger fraction.\n{names}"
                )


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The records begin..end-1 of a source; `report` is called for each of them with its Skip, or with None."""

    source: Source
    begin: int
    end: int
    report: Callable[[Skip | None], None] | None

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key in range(self.begin, self.end):
            row = row_of(self.source[key])
            if self.report is not None:
                self.report(row if isinstance(row, Skip) else None)
            if isinstance(row, Skip):
                logger.warning("Skipped sample %s (%s): %s", row.id, row.reason, row.detail)
            else:
                yield key, row


def row_of(record: Conversation | Skip) -> dict[str, Any] | Skip:
    """Converts a record to the builder's features and reads its images.

    Returns:
        The features, or a `Skip` if an image is absent or is not an image.
    """
    if isinstance(record, Skip):
        return record
    images = []
    try:
        for image in record.images:
            open_image(image).close()
            images.append(image.read_bytes() if isinstance(image, Path) else image)
    except SkipRecord as error:
        return error.as_skip(record.id)
    return {"id": record.id, "images": images, "messages": json.dumps([_message(turn) for turn in record.turns])}


def _message(turn: Turn) -> dict[str, Any]:
    """Writes a turn in the form of transformers, in which `<image>` in a text stays text."""
    content = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part} for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        folder: The folder of the set, with its version.
        records: The number of written records of all splits.
        skips: The records that were left out. It is empty with Beam.
    """

    folder: Path
    records: int
    skips: list[Skip]


def prepare(
    sources: Mapping[str, Source],
    directory: str | Path,
    *,
    max_skipped: float = 0.01,
    records_per_shard: int = RECORDS_PER_SHARD,
    in_beam: bool = False,
    beam_flags: Sequence[str] = (),
) -> Prepared:
    """Writes sources as the splits of a prepared set. The folder of the set appears when it is complete.

    Args:
        sources: The source of each split by name.
        directory: The folder below which the set is written.
        max_skipped: The fraction of unusable records of a split above which nothing is written.
        records_per_shard: The number of records in a file.
        in_beam: Whether Apache Beam does the work. The records that are left out are then named only in the logs of its
            workers.
        beam_flags: The command-line flags of Beam (runner, project, ...).

    Raises:
        UserError: There is a prepared set already, or Beam is not installed.
        TooManySkips: A split has too many records that cannot be used.
    """
    if in_beam and importlib.util.find_spec("apache_beam") is None:
        raise UserError("Apache Beam is not installed; install it with pip install 'vr-jax[beam]'.")
    place = as_path(directory)
    if in_beam and not is_local(place):
        raise UserError(
            f"{place}: with Beam a prepared set is written to disks that all workers see; give one of these"
        )
    made = [one for one in (place / LlavaConversations.name, place / "downloads", place) if not one.exists()]
    with UploadedFolder(place) as files:  # array_record does not write to buckets
        builder = LlavaConversations(
            sources=sources,
            max_skipped=max_skipped,
            records_per_shard=records_per_shard,
            in_beam=in_beam,
            data_dir=str(files.local),
            file_format=tfds.core.FileFormat.ARRAY_RECORD,
        )
        target = place / pathlib.Path(builder.data_dir).absolute().relative_to(files.local.absolute())
        if target.exists():
            raise UserError(f"{target}: there is a prepared set already; remove it or choose another folder.")
        _write(builder, target, made, _download_config(in_beam, beam_flags))
        files.upload(last="dataset_info.json")
    return Prepared(target, sum(info.num_examples for info in builder.info.splits.values()), builder.skips)


def _download_config(in_beam: bool, beam_flags: Sequence[str]) -> tfds.download.DownloadConfig:
    config = tfds.download.DownloadConfig()
    if not in_beam:
        return config
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    options = PipelineOptions(list(beam_flags))
    runner = options.view_as(StandardOptions).runner or "DirectRunner"
    return dataclasses.replace(config, beam_options=options, beam_runner=runner)


def _write(
    builder: LlavaConversations, target: Path, made: Sequence[Path], config: tfds.download.DownloadConfig
) -> None:
    try:
        with file_errors(f"{target} cannot be written"):
            builder.download_and_prepare(download_config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    except BaseException as error:  # TFDS removes the files, and leaves the folders that it made above them.
        for place in made:
            close_after(error, functools.partial(remove_empty_folders, place))
        raise
