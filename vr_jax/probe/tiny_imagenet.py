"""Tiny-ImageNet's folder, as it is published: 200 classes, 100,000 + 10,000 images of 64 x 64 pixels.

    wnids.txt                                    the classes, one a line
    train/<wnid>/images/<wnid>_<k>.JPEG
    val/images/val_<k>.JPEG
    val/val_annotations.txt                      tab-separated: file, wnid, box (four numbers)

words.txt, the boxes and test/ (which has no labels) are not read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vr_jax.probe.errors import ProbeError

WNIDS, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
IMAGES = "*.JPEG"
_WNID = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class LabelledImage:
    """name: of the file, relative to the data's folder."""

    name: str
    label: int  # index into the classes


@dataclass(frozen=True)
class TinyImageNet:
    """classes: wnids in the order of wnids.txt."""

    folder: Path
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]

    @property
    def fingerprint(self) -> str:
        """Tells data apart by names and labels; images are not read."""
        lines = [f"{part.name} {self.classes[part.label]}\n" for split in (self.train, self.val) for part in split]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(folder: Path) -> TinyImageNet:
    """Lists the images without opening one; a validation image that is not there is found out when it is read.

    Raises ProbeError for another layout, an empty class, and annotations that do not fit."""
    _check_layout(folder)
    classes = _classes(folder / WNIDS)
    train = tuple(
        LabelledImage(str(path.relative_to(folder)), label)
        for label, wnid in enumerate(classes)
        for path in _class_images(folder, wnid)
    )
    extra = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir() and path.name not in classes)
    if extra:
        raise ProbeError(f"{folder / 'train'} has folders of classes that {WNIDS} lacks: {_some(extra)}")
    return TinyImageNet(folder, classes, train, _validation(folder, classes))


def subset(images: tuple[LabelledImage, ...], count: int, seed: int) -> tuple[LabelledImage, ...]:
    """`count` images at random, of every class equally many or one more; 0, or as many as there are: all.

    A class that has fewer leaves its share to the others."""
    if count in (0, len(images)):
        return images
    if count > len(images):
        raise ProbeError(f"{count} images are asked for, the data has {len(images)}")
    rng = np.random.default_rng(seed)
    turn: dict[int, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in rng.permutation(len(images)):
        label = images[index].label
        turn[label] = turn.get(label, -1) + 1
        ranked.append((turn[label], len(ranked), index))
    chosen = sorted(index for _, _, index in sorted(ranked)[:count])
    return tuple(images[index] for index in chosen)


def _check_layout(folder: Path) -> None:
    if not folder.is_dir():
        raise ProbeError(f"{folder}: no such folder; --data takes the unpacked tiny-imagenet-200")
    for name in (WNIDS, "train", "val/images", ANNOTATIONS):
        if not (folder / name).exists():
            inner = next((path for path in sorted(folder.iterdir()) if (path / WNIDS).is_file()), None)
            hint = f"did you mean {inner}?" if inner else "it is not laid out as tiny-imagenet-200 is published"
            raise ProbeError(f"{folder} has no {name}; {hint}")


def _classes(path: Path) -> tuple[str, ...]:
    classes = [line.strip() for line in _lines(path) if line.strip()]
    wrong = [name for name in classes if not _WNID.fullmatch(name)]
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if wrong or twice or len(classes) < 2:
        what = f"no class names: {_some(wrong)}" if wrong else f"listed twice: {_some(twice)}" if twice else ""
        raise ProbeError(f"{path}: {what or f'{len(classes)} class(es)'}; expected at least two wnids, one a line")
    return tuple(classes)


def _class_images(folder: Path, wnid: str) -> list[Path]:
    images = folder / "train" / wnid / "images"
    if not images.is_dir():
        raise ProbeError(f"class {wnid} of {WNIDS} has no folder {images}")
    found = sorted(images.glob(IMAGES))
    if not found:
        raise ProbeError(f"class {wnid} is empty: {images} has no {IMAGES}")
    return found


def _validation(folder: Path, classes: tuple[str, ...]) -> tuple[LabelledImage, ...]:
    path = folder / ANNOTATIONS
    labels = {wnid: label for label, wnid in enumerate(classes)}
    images: dict[str, LabelledImage] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if not wnid or "/" in name or "\\" in name:
            raise ProbeError(f"{path}, line {number}: expected file <tab> wnid <tab> box, found {line[:80]!r}")
        if wnid not in labels:
            raise ProbeError(f"{path}, line {number}: {name} is of class {wnid!r}, which {WNIDS} lacks")
        if name in images:
            raise ProbeError(f"{path}, line {number}: {name} has an annotation already")
        images[name] = LabelledImage(f"val/images/{name}", labels[wnid])
    if not images:
        raise ProbeError(f"{path} is empty; expected file <tab> wnid <tab> box, one a line")
    extra = sorted(file.name for file in (folder / "val/images").glob(IMAGES) if file.name not in images)
    if extra:
        raise ProbeError(f"{folder / 'val/images'} has images without annotation: {_some(extra)}")
    return tuple(images.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ProbeError(f"{path} is no text file: {error}") from None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
