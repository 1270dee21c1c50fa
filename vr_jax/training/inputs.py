"""Opens the training data of a run as an endless iterator of host batches, and puts those onto the devices."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from vr_jax import distributed
from vr_jax.data.demo.source import DemoSource
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.fingerprint import fingerprint
from vr_jax.data.llava_yaml import SUFFIXES, read_llava_yaml
from vr_jax.data.mixture import counts_of_shares, counts_of_weights, samples_of_epoch
from vr_jax.data.pipeline import make_train_iterator
from vr_jax.data.processor import Processor
from vr_jax.data.prompts.chat_templates import ChatTemplate
from vr_jax.data.selection import selected
from vr_jax.data.skips import SkipStatistics
from vr_jax.data.sources import ConcatenatedSource, Source, open_source
from vr_jax.data.types import HostBatch
from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import check
from vr_jax.hub import local_folder
from vr_jax.model.batch import Batch, BatchShape
from vr_jax.model_directory import has_tokenizer, load_tokenizer, read_sections
from vr_jax.settings import DEMO, BatchSettings, DataSettings, SourceSettings, TrainConfig
from vr_jax.sharding import batch_sharding, batch_shards
from vr_jax.storage import Path, UploadedFolder, as_path, split_paths

logger = logging.getLogger("vr_jax.training")


class BatchIterator(Protocol):
    """An endless iterator of batches whose position can be saved (`vr_jax.data.pipeline.make_train_iterator`)."""

    def __next__(self) -> HostBatch:
        """Returns this process's rows of the next global batch."""

    def get_state(self) -> Any:
        """Returns how far this process is in the data as a JSON-safe value."""

    def set_state(self, states: list[Any]) -> None:
        """Continues from the states of all processes of a run, in their order, as many as it then had.

        Raises:
            UserError: They are those of other data, or cannot be shared among the processes of now.
        """

    def close(self) -> None:
        """Ends the processes and threads that read ahead."""


@dataclass(frozen=True)
class Inputs:
    """The training data of this process.

    Attributes:
        iterator: An endless iterator of this process's rows of each global batch.
        samples: Samples of one epoch, before any is skipped, over all processes and sources.
        tokenizer_dir: Folder of the tokenizer's files, which the exported model gets.
        data: What tells these data apart from others (`vr_jax.data.fingerprint`); None where nothing does.
        processor: Prepares a sample; None where the batches are not made of samples.
        sources: The names of the sources, by which the numbers of the run are told apart; empty if there is only one.
    """

    iterator: BatchIterator
    samples: int
    tokenizer_dir: Path | None
    data: Mapping[str, Any] | None = None
    processor: Processor | None = None
    sources: tuple[str, ...] = ()


def init_directories(config: TrainConfig) -> list[Path]:
    """Returns the model directories that a run takes its parameters from; those on the hub are downloaded first.

    Raises:
        UserError: One cannot be downloaded.
    """
    return [local_folder(part) for part in split_paths(config.init_from)]


def check_batch(batch: BatchSettings, mesh: Mesh) -> None:
    """Checks that the rows of a batch can be shared among the devices, the micro-batches and the processes.

    Raises:
        ConfigError: They cannot; the message names the sizes.
    """
    shards, processes = batch_shards(mesh), jax.process_count()
    pieces = shards * batch.accumulation
    if batch.rows % pieces:
        raise ConfigError(
            f"config.batch.rows = {batch.rows} is not divisible by {pieces} = replica {mesh.shape['replica']} x "
            f"fsdp {mesh.shape['fsdp']} x accumulation {batch.accumulation}"
        )
    if shards % processes:
        raise ConfigError(
            f"config.mesh: replica x fsdp = {shards} pieces of the batch for {processes} processes; it must be a "
            "multiple, so that each process reads its own rows (choose tensor at most the devices of one process)"
        )


def open_inputs(config: TrainConfig, mesh: Mesh, workdir: Path) -> Inputs:
    """Opens the data, the tokenizer and the pipeline of a run.

    Args:
        config: The settings of the run.
        mesh: The devices.
        workdir: Folder of the run; the demo's tokenizer is written there.

    Raises:
        UserError: The data, the tokenizer or the shapes cannot work. Nothing has been trained by then.
    """
    check_batch(config.batch, mesh)
    source = open_training_source(config.data, config.seed)
    directory = tokenizer_directory(config, workdir)
    processor = _processor(config, _tokenizer(config, directory))
    processes = jax.process_count()
    shape = batch_shape(config, processes)
    iterator = make_train_iterator(
        source,
        processor,
        shape,
        seed=config.seed,
        num_epochs=None,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
        num_workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=processes,
        max_skipped=config.data.max_skipped,
        allow_other_weights=config.data.allow_other_weights,
    )
    names = getattr(source, "names", ())
    names = names if len(names) > 1 else ()
    return Inputs(iterator, samples_of_epoch(source), directory, fingerprint(source), processor, names)


def open_samples(config: TrainConfig, source: Source | None = None) -> tuple[Source, Processor, BatchShape]:
    """Opens the samples of a run without a run: its source, its processor, and the shape of the whole batch.

    Args:
        config: The settings of the run.
        source: Other samples in the place of the run's.

    Raises:
        UserError: The data or the tokenizer cannot work.
    """
    source = open_training_source(config.data, config.seed) if source is None else source
    directory = as_path(".") if config.tokenizer == DEMO else tokenizer_directory(config, as_path("."))
    return source, _processor(config, _tokenizer(config, directory)), batch_shape(config, 1)


def batch_shape(config: TrainConfig, parts: int) -> BatchShape:
    """Returns the shape of the rows of an update that one of several parts has.

    Args:
        config: The settings of the run.
        parts: The number of equal parts: processes, or processes times micro-batches.
    """
    return BatchShape(
        rows=config.batch.rows // parts,
        tokens=config.batch.tokens,
        tiles=config.batch.tiles,
        tile_size=config.model.image.tile_size,
    )


def _tokenizer(config: TrainConfig, directory: Path) -> Any:
    return demo_tokenizer() if config.tokenizer == DEMO else load_tokenizer(directory)


def _processor(config: TrainConfig, tokenizer: Any) -> Processor:
    try:
        processor = Processor(
            tokenizer,
            config.model,
            config.data.template,
            config.data.label_quirk,
            max_pixels=config.data.max_pixels,
            rotate=config.data.exif_rotation,
        )
    except UserError as error:
        raise ConfigError(f"config.tokenizer, config.model.template: {error}") from error
    chat = processor.encoder.format
    named = chat.named if isinstance(chat, ChatTemplate) else "vicuna_v1"
    check(
        chat.closes_replies,
        "config.model.template = 'tokenizer': the tokenizer's chat template writes no special token behind a reply, so "
        f"that a model would not learn to end one; set {named!r} instead",
    )
    return processor


def training_sources(data: DataSettings) -> tuple[SourceSettings, ...]:
    """Returns the sources that the settings of the data name, those of LLaVA's list in a YAML file among them.

    Raises:
        UserError: The file cannot be read, or one of its fields is not known.
    """
    listed = [one.path for one in data.sources if one.path.endswith(SUFFIXES)]
    check(not listed, f"config.data.sources: {', '.join(listed)} lists sources itself; give it as config.data.path")
    if not data.path.endswith(SUFFIXES):
        return data.all_sources
    (one,) = data.all_sources
    check(
        one.format in ("", "llava_json") and one.split == "train",
        f"config.data.path = {one.path} lists JSON files of LLaVA: leave config.data.format and config.data.split out",
    )
    found = []
    for path, strategy in read_llava_yaml(as_path(one.path)):
        try:
            found.append(
                SourceSettings(path=path, images=one.images, follow_links=one.follow_links, sampling_strategy=strategy)
            )
        except ConfigError as error:
            raise ConfigError(f"{one.path}: {error}") from error
    return tuple(found)


def open_training_source(data: DataSettings, seed: int = 0) -> Source:
    """Opens the samples that a run trains on: one source, several, or generated images.

    Args:
        data: The settings of the data.
        seed: The seed of the records that sources choose at random.

    Raises:
        UserError: No source is set, or one of them cannot be opened.
    """
    if data.generated:
        return DemoSource(data.split, data.demo.size, data.demo.seed, turns=data.demo.turns)
    sources = training_sources(data)
    if not sources:
        raise ConfigError("config.data.path is not set: give the training data, e.g. --config.data.path=FILE.json")
    if data.format == DEMO:
        logger.info("config.data.path is set, so the generated images of config.data.format = %r are not used", DEMO)
    opened = [
        selected(
            open_source(
                one.path,
                images=one.images or None,
                format=one.format or None,
                split=one.split,
                follow_links=one.follow_links,
            ),
            one.sampling_strategy,
            seed,
        )
        for one in sources
    ]
    counts = _counts(sources, [len(source) for source in opened])
    if len(opened) == 1 and counts is None:
        return opened[0]
    return ConcatenatedSource(opened, source_names(sources), counts)


def _counts(sources: Sequence[SourceSettings], lengths: list[int]) -> tuple[int, ...] | None:
    """The samples of each source in an epoch, or None if each record is read once.

    Raises:
        ConfigError: The weight or the share of a source is so small that an epoch has no sample of it.
    """
    if all(one.weight is None and one.share is None for one in sources):
        return None
    weights = [one.weight for one in sources if one.weight is not None]
    if weights:
        counts = counts_of_weights(lengths, weights)
    else:
        counts = counts_of_shares(lengths, [1.0 if one.share is None else one.share for one in sources])
    for one, count, length in zip(sources, counts, lengths, strict=True):
        rate = f"share = {one.share}" if one.weight is None else f"weight = {one.weight}"
        check(
            count > 0,
            f"config.data.sources: an epoch of {sum(counts)} samples has none of {one.path} ({length} records, "
            f"{rate}); raise its rate, or leave it out",
        )
    return counts


def source_names(sources: Sequence[SourceSettings]) -> tuple[str, ...]:
    """Returns the names of sources: those that are set, and otherwise the last parts of their paths, made different."""
    found: list[str] = [one.name for one in sources]
    for number, one in enumerate(sources):
        if one.name:
            continue
        last = pathlib.PurePath(split_paths(one.path)[0].rstrip("/")).name
        stem = (
            re.sub(r"[^A-Za-z0-9_.-]+", "_", last.removesuffix(pathlib.PurePath(last).suffix)).strip("_.-") or "source"
        )
        name, k = stem, 1
        while name in found:
            name, k = f"{stem}-{k + 1}", k + 1
        found[number] = name
    return tuple(found)


def tokenizer_directory(config: TrainConfig, workdir: Path) -> Path:
    """Returns the folder of the tokenizer's files. Those of the demo's tokenizer are written to the workdir first.

    Raises:
        UserError: No folder that the settings name holds a tokenizer.
    """
    if config.tokenizer == DEMO:
        directory = workdir / "tokenizer"
        if jax.process_index() == 0:
            with UploadedFolder(directory) as folder:
                demo_tokenizer().save_pretrained(folder.local)
                folder.upload()
        return directory
    if config.tokenizer:
        places = [local_folder(config.tokenizer)]
    else:
        # The tokenizer belongs to the decoder, whatever else a directory holds and wherever it stands in the list.
        places = [place for place in init_directories(config) if "decoder" in read_sections(place)]
    for place in places:
        if has_tokenizer(place):
            return place
    if config.tokenizer or places:
        where = f"{', '.join(map(str, places))} holds none"
    elif config.init_from:
        where = f"no directory of config.init_from = {config.init_from} holds a decoder"
    else:
        where = "config.tokenizer and config.init_from are empty"
    raise UserError(f"no tokenizer: {where}; set config.tokenizer to a directory with tokenizer.json")


def over_processes(mine: SkipStatistics) -> SkipStatistics:
    """Returns the counts of the samples of all processes, which call it together.

    Args:
        mine: The counts of this process.
    """
    found = SkipStatistics(mine.max_fraction)
    for state in distributed.gather(mine.get_state()):
        found.add_state(state)
    return found


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts this process's rows onto its devices, as its part of the global batch."""
    where = batch_sharding(mesh)
    placed: Batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)
    return placed
