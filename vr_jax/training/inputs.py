"""From a recipe's `data`, `batch` and `tokenizer` to an iterator of host batches and device batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import AutoTokenizer

from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.pipeline import make_train_iterator
from vr_jax.data.processor import Processor
from vr_jax.data.sources import Source, open_source
from vr_jax.data.types import HostBatch
from vr_jax.model.batch import Batch, BatchShape
from vr_jax.model.config import VlmConfig
from vr_jax.sharding import batch_sharding, batch_shards

DEMO = "demo"


class InputError(ValueError):
    """Data settings that cannot work; one line for the user."""


class BatchIterator(Protocol):
    """What the loop needs of `vr_jax.data.pipeline.make_train_iterator`'s iterators."""

    def __next__(self) -> HostBatch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """An endless stream of this process's part of each global batch.

    samples: of one epoch, before any is skipped. tokenizer_dir: where the exported model's tokenizer files are."""

    iterator: BatchIterator
    samples: int
    tokenizer_dir: Path | None


def init_directories(config: ConfigDict) -> list[Path]:
    """The model directories that a run starts from."""
    return [Path(part.strip()) for part in config.init_from.split(",") if part.strip()]


def check_batch(batch: Mapping[str, int], mesh: Mesh) -> None:
    """Raises InputError for sizes that cannot be cut into the pieces of this mesh."""
    for name in ("rows", "tokens", "tiles", "accumulation"):
        if batch[name] < 1:
            raise InputError(f"config.batch.{name} = {batch[name]}: expected a positive number")
    shards, processes = batch_shards(mesh), jax.process_count()
    pieces = shards * batch["accumulation"]
    if batch["rows"] % pieces:
        raise InputError(
            f"config.batch.rows = {batch['rows']} is not divisible by {pieces} = replica {mesh.shape['replica']} x "
            f"fsdp {mesh.shape['fsdp']} x accumulation {batch['accumulation']}"
        )
    if shards % processes:
        raise InputError(
            f"config.mesh: replica x fsdp = {shards} pieces of the batch for {processes} processes; it must be a "
            "multiple, so that each process reads its own rows (choose tensor at most the devices of one process)"
        )


def open_inputs(config: ConfigDict, model: VlmConfig, mesh: Mesh, workdir: Path) -> Inputs:
    """Raises InputError, SourceError or ConfigError for settings that cannot work, before anything is trained."""
    check_batch(config.batch, mesh)
    source = _open_source(config)
    directory = tokenizer_directory(config, workdir)
    tokenizer = _load_tokenizer(config, directory)
    try:
        processor = Processor(tokenizer, model, config.data.template, config.data.label_quirk)
    except ValueError as error:
        raise InputError(f"config.tokenizer, config.data.template: {error}") from error
    processes = jax.process_count()
    shape = BatchShape(
        rows=config.batch.rows // processes,
        tokens=config.batch.tokens,
        tiles=config.batch.tiles,
        tile_size=model.image.tile_size,
    )
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
    )
    return Inputs(iterator, len(source), directory)


def _open_source(config: ConfigDict) -> Source:
    data = config.data
    if data.format == DEMO:
        return open_source({"format": DEMO, "split": data.split, **data.options.to_dict()})
    if not data.path:
        raise InputError("config.data.path is not set: give the training data, e.g. --config.data.path=FILE.json")
    spec = {name: data[name] for name in ("path", "images", "format", "split") if data[name]}
    return open_source({**spec, **data.options.to_dict()})


def tokenizer_directory(config: ConfigDict, workdir: Path) -> Path:
    """Where the tokenizer's files are; the demo's are written there first. Raises InputError if there are none."""
    if config.tokenizer == DEMO:
        directory = workdir / "tokenizer"
        if jax.process_index() == 0:
            demo_tokenizer().save_pretrained(directory)
        return directory
    places = [Path(config.tokenizer)] if config.tokenizer else init_directories(config)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    for place in places:
        if any((place / name).is_file() for name in files):
            return place
    where = ", ".join(map(str, places)) or "config.tokenizer and config.init_from are empty"
    raise InputError(f"no tokenizer: {where}; set config.tokenizer to a directory with tokenizer.json")


def _load_tokenizer(config: ConfigDict, directory: Path) -> Any:
    if config.tokenizer == DEMO:
        return demo_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: no usable tokenizer ({str(error).splitlines()[0]})") from error


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch on the mesh."""
    where = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)
