"""A TensorFlow Datasets builder that writes conversations as array_record files; tensorflow is not needed.

Pictures are stored as the encoded bytes they came in, so that nothing is decoded or compressed twice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vr_jax.data.images import open_image
from vr_jax.data.skips import SkipRecord, TooManySkips, logger, summary
from vr_jax.data.sources import Source
from vr_jax.data.types import Conversation, Skip

CHUNK = 256  # records per Beam work item


class LlavaConversations(tfds.core.GeneratorBasedBuilder):
    """One split per source; record i of a split is the i-th usable record of its source.

    sources: split name -> source. max_skipped: share of unusable records above which TooManySkips is raised.
    use_beam: generate with Apache Beam (pass `tfds.download.DownloadConfig(beam_runner=..., beam_options=...)`)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, sources: Mapping[str, Source], max_skipped: float = 0.01, use_beam: bool = False, **kwargs: Any
    ):
        self.sources = dict(sources)
        self.max_skipped = max_skipped
        self.use_beam = use_beam
        self.skips: list[Skip] = []
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about pictures in LLaVA's schema, pictures as encoded files.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
                    "conversations": tfds.features.Sequence(
                        {"from": tfds.features.Text(), "value": tfds.features.Text()}
                    ),
                }
            ),
            disable_shuffling=True,  # the order of the source; training shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        make = self._beam_examples if self.use_beam else self._generate_examples
        return {split: make(source) for split, source in self.sources.items()}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        skipped = 0
        for key in range(len(source)):
            row = row_of(source[key])
            if isinstance(row, Skip):
                skipped += 1
                self.skips.append(row)
                logger.warning("skipped sample %s (%s): %s", row.id, row.reason, row.detail)
            else:
                yield key, row
        if skipped > self.max_skipped * len(source):
            raise TooManySkips(f"{skipped} of {len(source)} records cannot be used\n{summary(self.skips)}")

    def _beam_examples(self, source: Source) -> Any:
        import apache_beam as beam

        chunks = range(0, len(source), CHUNK)
        return beam.Create(chunks) | beam.FlatMap(_ReadChunk(source))


@dataclasses.dataclass(frozen=True)
class _ReadChunk:
    source: Source

    def __call__(self, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for key in range(first, min(first + CHUNK, len(self.source))):
            row = row_of(self.source[key])
            if isinstance(row, Skip):
                logger.warning("skipped sample %s (%s): %s", row.id, row.reason, row.detail)
            else:
                yield key, row


def row_of(record: Conversation | Skip) -> dict[str, Any] | Skip:
    """A record as the builder's features, its pictures read; a Skip if one is absent or no picture."""
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
    use_beam: bool = False,
    beam_options: Any = None,
    max_shard_bytes: int = 1 << 30,
) -> Prepared:
    """Writes the sources as splits below `directory`.

    The folder appears when it is complete. beam_options: Beam's PipelineOptions or command-line flags. With Beam the
    records left out are named in its workers' logs only.
    Raises TooManySkips, FileExistsError for a set that is already there, ModuleNotFoundError without Beam."""
    if use_beam and importlib.util.find_spec("apache_beam") is None:
        raise ModuleNotFoundError("apache_beam is not installed: pip install 'vr-jax[beam]'")
    builder = LlavaConversations(
        sources=sources,
        max_skipped=max_skipped,
        use_beam=use_beam,
        data_dir=str(directory),
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    target = Path(str(builder.data_dir))
    if target.exists():
        raise FileExistsError(f"{target} holds a prepared set already; remove it or choose another folder")
    config = tfds.download.DownloadConfig(max_shard_size=max_shard_bytes)
    if use_beam:
        from apache_beam.options.pipeline_options import PipelineOptions

        options = beam_options if isinstance(beam_options, PipelineOptions) else PipelineOptions(beam_options or [])
        config = dataclasses.replace(config, beam_options=options)
    builder.download_and_prepare(download_config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    if use_beam:
        _check_written(builder, target)
    return Prepared(target, sum(info.num_examples for info in builder.info.splits.values()), builder.skips)


def _check_written(builder: LlavaConversations, target: Path) -> None:
    """Beam's workers cannot know the share of what they skip; a set with too few records is taken away again."""
    for split, source in builder.sources.items():
        written = builder.info.splits[split].num_examples
        if len(source) - written > builder.max_skipped * len(source):
            tfds.core.Path(target).rmtree()
            raise TooManySkips(
                f"split {split}: {len(source) - written} of {len(source)} records cannot be used; Beam's logs name them"
            )
