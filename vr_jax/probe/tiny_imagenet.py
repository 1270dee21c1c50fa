"""Tiny-ImageNet as it is published: 200 classes with 100,000 training and 10,000 validation images of 64 x 64 pixels.

    wnids.txt                                    the names of the classes, one on each line
    train/<wnid>/images/<wnid>_<k>.JPEG
    val/images/val_<k>.JPEG
    val/val_annotations.txt                      file, wnid and four numbers of a box, separated by tabs

The files words.txt, the boxes and the folder test/, which has no labels, are not read.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from vr_jax.errors import UserError
from vr_jax.storage import Path, in_order

WNIDS, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
IMAGES = "*.JPEG"
_WNID = re.compile(r"[A-Za-z0-9_-]+")
_ANNOTATION = "a file name, a tab, a wnid, a tab and a box"


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its class.

    Attributes:
        name: The path of the file relative to the folder of the data.
        label: The index of the class.
    """

    name: str
    label: int


@dataclass(frozen=True)
class TinyImageNet:
    """The images of the data set.

    Attributes:
        folder: The folder of the data.
        classes: The names of the classes (wnids) in the order of wnids.txt.
        train: The training images.
        val: The validation images.
    """

    folder: Path
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the names and classes of all images; the contents of the images do not matter."""
        lines = [f"{part.name} {self.classes[part.label]}\n" for split in (self.train, self.val) for part in split]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(folder: Path) -> TinyImageNet:
    """Lists the images without opening one; a missing validation image is noticed when it is read.

    Args:
        folder: The unpacked folder of the data.

    Raises:
        UserError: The folder has another layout, a class has no images, or annotations and images do not match.
    """
    _check_layout(folder)
    classes = _classes(folder / WNIDS)
    train = tuple(
        LabelledImage(str(path.relative_to(folder)), label)
        for label, wnid in enumerate(classes)
        for path in _class_images(folder, wnid)
    )
    extra = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir() and path.name not in classes)
    if extra:
        raise UserError(f"{folder / 'train'}: there are folders of classes that {WNIDS} does not list: {_some(extra)}.")
    return TinyImageNet(folder, classes, train, _validation(folder, classes))


def subset(images: tuple[LabelledImage, ...], count: int, seed: int) -> tuple[LabelledImage, ...]:
    """Chooses images at random so that the numbers of any two classes differ by at most one.

    A class with too few images leaves its share to the others.

    Args:
        images: All images.
        count: The number of images to choose; 0 returns all of them.
        seed: The seed of the choice.

    Raises:
        UserError: There are fewer than `count` images.
    """
    if count in (0, len(images)):
        return images
    if count > len(images):
        raise UserError(f"{count} images are asked for, but the data has only {len(images)}.")
    rng = np.random.default_rng(seed)
    drawn: dict[int, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in rng.permutation(len(images)).tolist():
        label = images[index].label
        drawn[label] = drawn.get(label, -1) + 1
        ranked.append((drawn[label], len(ranked), index))
    chosen = sorted(index for _, _, index in sorted(ranked)[:count])
    return tuple(images[index] for index in chosen)


def _check_layout(folder: Path) -> None:
    """Checks that the files and folders of the published layout exist."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data needs the unpacked folder tiny-imagenet-200.")
    for name in (WNIDS, "train", "val/images", ANNOTATIONS):
        if not (folder / name).exists():
            inner = next((path for path in in_order(folder.iterdir()) if (path / WNIDS).is_file()), None)
            hint = f"did you mean {inner}?" if inner else "expected the published layout of tiny-imagenet-200."
            raise UserError(f"{folder}: there is no {name}; {hint}")


def _classes(path: Path) -> tuple[str, ...]:
    """Reads the names of the classes."""
    classes = [line.strip() for line in _lines(path) if line.strip()]
    wrong = [name for name in classes if not _WNID.fullmatch(name)]
    twice = sorted({name for name in classes if classes.count(name) > 1})
    problem = None
    if wrong:
        problem = f"{_some(wrong)} cannot be names of classes"
    elif twice:
        problem = f"{_some(twice)} are listed twice"
    elif len(classes) < 2:
        problem = f"{len(classes)} class(es) are listed"
    if problem:
        raise UserError(f"{path}: {problem}; expected at least two different wnids, one on each line.")
    return tuple(classes)


def _class_images(folder: Path, wnid: str) -> list[Path]:
    """Lists the training images of a class."""
    images = folder / "train" / wnid / "images"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder, although {WNIDS} lists the class {wnid}.")
    found = in_order(images.glob(IMAGES))
    if not found:
        raise UserError(f"{images}: there is no {IMAGES}, so the class {wnid} is empty.")
    return found


def _validation(folder: Path, classes: tuple[str, ...]) -> tuple[LabelledImage, ...]:
    """Reads the annotations of the validation images."""
    path = folder / ANNOTATIONS
    labels = {wnid: label for label, wnid in enumerate(classes)}
    images: dict[str, LabelledImage] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if not wnid or "/" in name or "\\" in name:
            raise UserError(f"{path}, line {number}: expected {_ANNOTATION}, found {line[:80]!r}.")
        if wnid not in labels:
            raise UserError(f"{path}, line {number}: {name} has the class {wnid!r}, which {WNIDS} does not list.")
        if name in images:
            raise UserError(f"{path}, line {number}: {name} has a second annotation; remove one of the two.")
        images[name] = LabelledImage(f"val/images/{name}", labels[wnid])
    if not images:
        raise UserError(f"{path}: the file is empty; expected on each line {_ANNOTATION}.")
    extra = sorted(file.name for file in (folder / "val/images").glob(IMAGES) if file.name not in images)
    if extra:
        raise UserError(f"{folder / 'val/images'}: there are images without annotation: {_some(extra)}.")
    return tuple(images.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a text file ({error}).") from None


def _some(names: list[str]) -> str:
    """Lists up to three names."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
