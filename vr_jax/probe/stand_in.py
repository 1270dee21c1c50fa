"""A stand-in for Tiny-ImageNet: generated images in the same layout, for tests and for users without the data.

    vr-jax probe stand_in DIR [--classes=12] [--train=100] [--val=25]

A class is a colour and a fine texture (stripes, checks or dots of 3 pixels) on a disc somewhere on a grey ground, with
noise: the colour survives pooling, the texture is what compression can lose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from vr_jax.probe.errors import ProbeError
from vr_jax.probe.tiny_imagenet import ANNOTATIONS, WNIDS, WORDS
from vr_jax.storage import complete_directory

SIDE = 64  # pixels
PERIOD = 6  # of the textures, pixels
COLOURS = {
    "red": (215, 45, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 220),
    "yellow": (235, 200, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 190, 205),
}
TEXTURES = ("upright stripes", "level stripes", "checks", "dots")
GREY_EVERY = 50  # every so many images of a class one is stored without colours, as in the real data
_BYTES = 4000  # of an image, at most

NAMES = tuple(f"{colour} {texture}" for texture, colour in itertools.product(TEXTURES, COLOURS))


def draw(label: int, rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """An image of class `label`."""
    texture, colour = divmod(label, len(COLOURS))
    ink = np.asarray(list(COLOURS.values())[colour]) + rng.integers(-20, 21, 3)
    y, x = np.mgrid[:SIDE, :SIDE]
    radius = rng.integers(16, 29)
    centre = rng.integers(radius, SIDE - radius, 2)
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    ground = np.full((SIDE, SIDE, 3), rng.integers(90, 200), float)
    ground[disc] = 240
    ground[disc & _texture(TEXTURES[texture], y + rng.integers(PERIOD), x + rng.integers(PERIOD))] = ink
    return np.clip(ground + rng.normal(0, 8, ground.shape), 0, 255).astype(np.uint8)


def _texture(name: str, y: np.ndarray, x: np.ndarray) -> Bool[np.ndarray, "64 64"]:
    half = PERIOD // 2
    rows, columns = y % PERIOD < half, x % PERIOD < half
    return {"upright stripes": columns, "level stripes": rows, "checks": rows ^ columns, "dots": rows & columns}[name]


def write(folder: Path, *, classes: int = 12, train: int = 100, val: int = 25, seed: int = 0) -> None:
    """Writes `classes` classes of `train` + `val` images each; all or nothing.

    Raises ProbeError for a folder that holds files, and for numbers that make no sense."""
    if not 2 <= classes <= len(NAMES) or train < 1 or val < 1:
        raise ProbeError(
            f"classes = {classes}, train = {train}, val = {val}: expected 2..{len(NAMES)} classes, at least 1 image"
        )
    with complete_directory(folder, size=classes * (train + val) * _BYTES) as temporary:
        _write(temporary, [*_spread(classes)], train, val, np.random.default_rng(seed))


def _spread(classes: int) -> Iterator[int]:
    """Labels with every texture and as few colours as that allows."""
    for k in range(classes):
        yield k % len(TEXTURES) * len(COLOURS) + k // len(TEXTURES)


def _write(folder: Path, labels: Sequence[int], train: int, val: int, rng: np.random.Generator) -> None:
    wnids = [f"n{10_000_000 + label:08d}" for label in labels]
    (folder / WNIDS).write_text("".join(f"{wnid}\n" for wnid in wnids))
    (folder / WORDS).write_text("".join(f"{w}\t{NAMES[label]}\n" for w, label in zip(wnids, labels, strict=True)))
    for wnid, label in zip(wnids, labels, strict=True):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        names = [f"{wnid}_{k}.JPEG" for k in range(train)]
        for k, name in enumerate(names):
            _save(draw(label, rng), images / name, grey=k % GREY_EVERY == GREY_EVERY - 1)
        boxes = "".join(f"{name}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for k, index in enumerate(rng.permutation(np.repeat(np.arange(len(labels)), val))):
        name = f"val_{k}.JPEG"
        _save(draw(labels[index], rng), folder / "val" / "images" / name)
        lines.append(f"{name}\t{wnids[index]}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n")
    (folder / ANNOTATIONS).write_text("".join(lines))


def _save(pixels: np.ndarray, path: Path, *, grey: bool = False) -> None:
    image = Image.fromarray(pixels)
    (image.convert("L") if grey else image).save(path, "JPEG", quality=90)
