"""Makes what all systems of the comparison share: the data, the frozen encoder and the uncompressed model.

Each is made once and kept in the work directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.accuracy.dataset import Dataset, generate
from benchmarks.accuracy.encoder import Cached, PatchReader, answer_accuracy, encode, train_encoder
from benchmarks.accuracy.reader import train_reader
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.training import CachedImages, new_model, size_of
from vr_jax.model.vlm import VisionLanguageModel

Log = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What every system starts from."""

    train: CachedImages
    held_out: Dataset
    held_out_cached: CachedImages
    encoder: PatchReader
    reader: VisionLanguageModel  # The trained, uncompressed model.


def prepare(setting: Setting, workdir: Path, log: Log) -> Prepared:
    """Loads what `workdir` holds and makes the rest.

    Raises:
        ValueError: The directory holds the work of another setting.
    """
    _check_setting(setting, workdir)
    start = time.perf_counter()
    train = generate(setting.page, "train", setting.images, seed=0, variants=setting.variants)
    held_out = generate(setting.page, "held_out", setting.held_out, seed=0, variants=setting.variants)
    log(f"{len(train)} + {len(held_out)} images in {time.perf_counter() - start:.0f} s")

    encoder = nnx.eval_shape(lambda: PatchReader(setting, rngs=nnx.Rngs(0)))
    encoder = stored(workdir / "encoder.npz", encoder, lambda: train_encoder(setting, train, seed=0, log=log))
    levels = [
        _stored_levels(workdir / name, encoder, data) for name, data in (("train", train), ("held_out", held_out))
    ]
    log(f"encoder: {answer_accuracy(encoder, held_out):.4f} of the held-out patches read right")

    cached, held_out_cached = CachedImages.of(train, levels[0]), CachedImages.of(held_out, levels[1])
    reader = nnx.eval_shape(lambda: new_model(size_of(setting), seed=0))
    reader = stored(workdir / "reader.npz", reader, lambda: train_reader(setting, cached, seed=0, log=log))
    return Prepared(cached, held_out, held_out_cached, encoder, reader)


def _check_setting(setting: Setting, workdir: Path) -> None:
    """Writes the setting into the directory, or compares it with the one there, so that two are never mixed."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, described = workdir / "setting.txt", f"{setting}\n"
    if path.exists() and path.read_text() != described:
        raise ValueError(
            f"{path} describes another setting:\n{path.read_text()}now asked for:\n{described}"
            "Give another --workdir, or remove this one."
        )
    if not path.exists():
        path.write_text(described)


def stored[Model: nnx.Module](path: Path, abstract: Model, make: Callable[[], Model]) -> Model:
    """Reads a module from a file, or makes and writes it. The arrays are in the order of the tree's leaves."""
    structure = jax.tree.structure(abstract)
    if path.exists():
        with np.load(path) as file:
            return jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    start = time.perf_counter()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(make())]
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *leaves)
    partial.rename(path)
    path.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.0f}\n")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def _stored_levels(folder: Path, encoder: PatchReader, data: Dataset) -> Cached:
    """Reads the encoder's hidden states of all images from a folder, or computes and writes them."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        for level, states in encode(encoder, data).items():
            np.save(partial / f"{level}.npy", states.view(np.uint16))  # NumPy's file format has no bfloat16.
        partial.rename(folder)
    dtype = encoder.cache_dtype
    return {level: np.load(folder / f"{level}.npy", mmap_mode="r").view(dtype) for level in encoder.levels}
