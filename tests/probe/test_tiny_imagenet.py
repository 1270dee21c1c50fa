"""The published layout of Tiny-ImageNet is read; folders with damage of any kind are refused with the reason."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from vr_jax.errors import UserError
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.tiny_imagenet import LabelledImage, subset


def test_labels_follow_folders_and_annotations(generated):
    data = tiny_imagenet.read(generated)
    assert (len(data.classes), len(data.train), len(data.val)) == (3, 150, 12)
    for image in data.train:
        assert image.name.split("/")[1] == data.classes[image.label]
    annotated = dict(
        line.split("\t")[:2] for line in (generated / "val" / "val_annotations.txt").read_text().splitlines()
    )
    assert {p.name.removeprefix("val/images/"): data.classes[p.label] for p in data.val} == annotated


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def folder_in(path):
    path.mkdir()
    return path


DAMAGES = {
    "no classes": (lambda d: (d / "wnids.txt").unlink(), "there is no wnids.txt; expected the published layout"),
    "no training": (lambda d: shutil.rmtree(d / "train"), "there is no train;"),
    "no validation": (lambda d: shutil.rmtree(d / "val" / "images"), "there is no val/images;"),
    "one folder up": (lambda d: d.rename(d / ".." / "x").rename(folder_in(d) / "tiny"), "did you mean "),
    "class listed twice": (
        lambda d: rewrite(d / "wnids.txt", lambda t: t + t.splitlines()[0]),
        "'n10000000' are listed twice; expected at least two different wnids",
    ),
    "no class name": (lambda d: rewrite(d / "wnids.txt", lambda t: t + "../n1\n"), "'../n1' cannot be names"),
    "one class": (lambda d: rewrite(d / "wnids.txt", lambda t: t.splitlines()[0]), "1 class(es) are listed"),
    "not text": (lambda d: (d / "wnids.txt").write_bytes(b"\xff\xfe\x00n"), "wnids.txt: expected a text file"),
    "class without folder": (
        lambda d: rewrite(d / "wnids.txt", lambda t: t + "n99999999\n"),
        "no such folder, although wnids.txt lists the class n99999999",
    ),
    "empty class": (
        lambda d: [p.unlink() for p in (d / "train/n10000000/images").iterdir()],
        "there is no *.JPEG, so the class n10000000 is empty",
    ),
    "class not listed": (lambda d: (d / "train" / "n12345678").mkdir(), "wnids.txt does not list: 'n12345678'"),
    "unknown class": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: t + "val_12.JPEG\tn00000009\t0\t0\t9\t9\n"),
        "line 13: val_12.JPEG has the class 'n00000009', which wnids.txt does not list",
    ),
    "no tabs": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: "val_0.JPEG n10000000\n" + t),
        "line 1: expected a file name, a tab, a wnid, a tab and a box, found 'val_0.JPEG n10000000'",
    ),
    "path": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: "../a.JPEG\tn10000000\t0\n" + t),
        "line 1: expected a file name",
    ),
    "annotated twice": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: t + t.splitlines()[2]),
        "line 13: val_2.JPEG has a second annotation",
    ),
    "no annotations": (
        lambda d: (d / "val/val_annotations.txt").write_text("\n"),
        "val_annotations.txt: the file is empty",
    ),
    "image without annotation": (
        lambda d: shutil.copy(d / "val/images/val_0.JPEG", d / "val/images/val_77.JPEG"),
        "there are images without annotation: 'val_77.JPEG'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, folder):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError) as caught:
        tiny_imagenet.read(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist():
    with pytest.raises(UserError, match="/nowhere: no such folder"):
        tiny_imagenet.read(Path("/nowhere"))


def test_a_subset_has_equally_many_images_of_every_class():
    images = tuple(LabelledImage(f"{label}/{k}", label) for label in range(4) for k in range(20))
    counts = Counter(image.label for image in subset(images, 30, seed=3))
    assert sorted(counts.values()) == [7, 7, 8, 8]
    assert subset(images, 30, seed=3) == subset(images, 30, seed=3) != subset(images, 30, seed=4)
    assert subset(images, 0, seed=3) == images
    uneven = (*images, *(LabelledImage(f"4/{k}", 4) for k in range(2)))
    assert Counter(image.label for image in subset(uneven, 42, seed=0)) == {0: 10, 1: 10, 2: 10, 3: 10, 4: 2}
    with pytest.raises(UserError, match="81 images are asked for, but the data has only 80"):
        subset(images, 81, seed=0)
