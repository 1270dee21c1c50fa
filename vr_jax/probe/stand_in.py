"""A stand-in for Tiny-ImageNet: generated images in the same layout, for tests and for users without the data.

A class is a colour and a fine texture (stripes, checks or dots of 3 pixels) on a disc that lies somewhere on a grey
background with noise. Pooling keeps the colour, whereas compression can lose the texture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from vr_jax.errors import UserError
from vr_jax.probe.tiny_imagenet import ANNOTATIONS, WNIDS, WORDS
from vr_jax.storage import Path, UploadedFolder, complete_directory

# The side of an image in pixels.
SIDE = 64
# The period of the textures in pixels.
PERIOD = 6
COLOURS = {
    "red": (215, 45, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 220),
    "yellow": (235, 200, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 190, 205),
}
TEXTURES = ("upright stripes", "level stripes", "checks", "dots")
# One image in this number of images of a class is grey-scale, as some images of the real data are.
GREY_EVERY = 50
CLASS_NAMES = tuple(f"{colour} {texture}" for texture, colour in itertools.product(TEXTURES, COLOURS))
# An encoded image has at most this number of bytes.
_IMAGE_BYTES = 4000


def write_stand_in(folder: Path, *, classes: int = 12, train: int = 100, val: int = 25, seed: int = 0) -> None:
    """Writes the data set, whole or not at all.

    Args:
        folder: The folder to write. It must not exist, or be empty.
        classes: The number of classes, from 2 to the number of `CLASS_NAMES`.
        train: The number of training images of each class.
        val: The number of validation images of each class.
        seed: The seed of the images.

    Raises:
        UserError: A number is out of its range, or the folder contains files.
    """
    if not 2 <= classes <= len(CLASS_NAMES) or train < 1 or val < 1:
        raise UserError(
            f"classes = {classes}, train = {train}, val = {val}: expected 2 to {len(CLASS_NAMES)} classes with at "
            "least 1 image each."
        )
    size = classes * (train + val) * _IMAGE_BYTES
    with complete_directory(folder, size=size) as work, UploadedFolder(work) as files:
        _write(files.local, chosen_labels(classes), train, val, np.random.default_rng(seed))
        files.upload()


def chosen_labels(classes: int) -> list[int]:
    """Chooses classes with every texture and as few colours as that allows.

    Returns:
        Indices of `CLASS_NAMES`.
    """
    return [k % len(TEXTURES) * len(COLOURS) + k // len(TEXTURES) for k in range(classes)]


def draw_image(label: int, rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """Draws a random image of the class `CLASS_NAMES[label]`."""
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


def _texture(name: str, y: Int[np.ndarray, "64 64"], x: Int[np.ndarray, "64 64"]) -> Bool[np.ndarray, "64 64"]:
    """Marks the pixels that a texture colours."""
    half = PERIOD // 2
    rows, columns = y % PERIOD < half, x % PERIOD < half
    return {"upright stripes": columns, "level stripes": rows, "checks": rows ^ columns, "dots": rows & columns}[name]


def _write(folder: Path, labels: Sequence[int], train: int, val: int, rng: np.random.Generator) -> None:
    """Writes the files of the data set."""
    wnids = [f"n{10_000_000 + label:08d}" for label in labels]
    (folder / WNIDS).write_text("".join(f"{wnid}\n" for wnid in wnids))
    words = "".join(f"{wnid}\t{CLASS_NAMES[label]}\n" for wnid, label in zip(wnids, labels, strict=True))
    (folder / WORDS).write_text(words)
    for wnid, label in zip(wnids, labels, strict=True):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        names = [f"{wnid}_{k}.JPEG" for k in range(train)]
        for k, name in enumerate(names):
            _save(draw_image(label, rng), images / name, grey=k % GREY_EVERY == GREY_EVERY - 1)
        boxes = "".join(f"{name}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for k, index in enumerate(rng.permutation(np.repeat(np.arange(len(labels)), val)).tolist()):
        name = f"val_{k}.JPEG"
        _save(draw_image(labels[index], rng), folder / "val" / "images" / name)
        lines.append(f"{name}\t{wnids[index]}\t0\t0\t{SIDE - 1}\t{SIDE - 1}\n")
    (folder / ANNOTATIONS).write_text("".join(lines))


def _save(pixels: UInt8[np.ndarray, "64 64 3"], path: Path, *, grey: bool = False) -> None:
    image = Image.fromarray(pixels)
    (image.convert("L") if grey else image).save(path, "JPEG", quality=90)
