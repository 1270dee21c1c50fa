"""The published layout: what is read, what is refused and how it is said; the generated stand-in."""

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.commands import run
from vr_jax.model.config import single_tile
from vr_jax.probe import stand_in, tiny_imagenet
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.images import Reader
from vr_jax.probe.tiny_imagenet import LabelledImage, subset


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stand_in"
    assert run("probe stand_in", folder, classes=3, train=50, val=4) == 0
    return folder


@pytest.fixture
def folder(generated, tmp_path):
    """A copy to damage."""
    shutil.copytree(generated, tmp_path / "data")
    return tmp_path / "data"


def test_the_stand_in_has_the_published_layout(generated):
    wnids = (generated / "wnids.txt").read_text().split()
    assert [line.split("\t")[0] for line in (generated / "words.txt").read_text().splitlines()] == wnids
    for wnid in wnids:
        boxes = (generated / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in boxes] == [f"{wnid}_{k}.JPEG" for k in range(50)]
        assert all(len(line.split("\t")) == 5 for line in boxes)
    modes = Counter()
    for path in generated.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
            modes[image.mode] += 1
    assert modes == {"RGB": 3 * 53, "L": 3}, "one grey-scale image in each class"


def test_labels_follow_folders_and_annotations(generated):
    data = tiny_imagenet.read(generated)
    assert (len(data.classes), len(data.train), len(data.val)) == (3, 150, 12)
    for image in data.train:
        assert image.name.split("/")[1] == data.classes[image.label]
    annotated = dict(
        line.split("\t")[:2] for line in (generated / "val" / "val_annotations.txt").read_text().splitlines()
    )
    assert {p.name.removeprefix("val/images/"): data.classes[p.label] for p in data.val} == annotated


def test_the_stand_in_is_repeatable_and_never_overwrites(generated, tmp_path, capsys):
    stand_in.write(tmp_path / "again", classes=3, train=50, val=4)
    for path in sorted(generated.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(generated)).read_bytes() == path.read_bytes()
    assert run("probe stand_in", generated) == 2
    assert "holds files; choose an empty folder" in capsys.readouterr().err
    assert run("probe stand_in", tmp_path / "new", classes=1) == 2
    assert "--classes=1: expected an integer >= 2 and <= 24" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_classes_differ_in_colour_and_texture():
    """Each is needed: classes of one colour have the same colours, classes of one texture the same layout."""
    assert len(set(stand_in.NAMES)) == len(stand_in.NAMES) == 24
    names = [stand_in.NAMES[k] for k in stand_in._spread(8)]
    assert Counter(name.split()[0] for name in names) == {"red": 4, "green": 4}
    assert Counter(name.split(" ", 1)[1] for name in names) == dict.fromkeys(stand_in.TEXTURES, 2)


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def folder_in(path):
    path.mkdir()
    return path


DAMAGES = {
    "no classes": (lambda d: (d / "wnids.txt").unlink(), "has no wnids.txt; it is not laid out as"),
    "no training": (lambda d: shutil.rmtree(d / "train"), "has no train;"),
    "no validation": (lambda d: shutil.rmtree(d / "val" / "images"), "has no val/images;"),
    "one folder up": (lambda d: d.rename(d / ".." / "x").rename(folder_in(d) / "tiny"), "did you mean "),
    "class listed twice": (lambda d: rewrite(d / "wnids.txt", lambda t: t + t.splitlines()[0]), "listed twice: 'n1"),
    "no class name": (lambda d: rewrite(d / "wnids.txt", lambda t: t + "../n1\n"), "no class names: '../n1'"),
    "not text": (lambda d: (d / "wnids.txt").write_bytes(b"\xff\xfe\x00n"), "is no text file"),
    "class without folder": (
        lambda d: rewrite(d / "wnids.txt", lambda t: t + "n99999999\n"),
        "class n99999999 of wnids.txt has no folder",
    ),
    "empty class": (
        lambda d: [p.unlink() for p in (d / "train/n10000000/images").iterdir()],
        "class n10000000 is empty",
    ),
    "class not listed": (lambda d: (d / "train" / "n12345678").mkdir(), "that wnids.txt lacks: 'n12345678'"),
    "unknown class": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: t + "val_12.JPEG\tn00000009\t0\t0\t9\t9\n"),
        "line 13: val_12.JPEG is of class 'n00000009', which wnids.txt lacks",
    ),
    "no tabs": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: "val_0.JPEG n10000000\n" + t),
        "line 1: expected file <tab> wnid <tab> box, found 'val_0.JPEG n10000000'",
    ),
    "path": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: "../a.JPEG\tn10000000\t0\n" + t),
        "line 1: expected file <tab> wnid",
    ),
    "annotated twice": (
        lambda d: rewrite(d / "val/val_annotations.txt", lambda t: t + t.splitlines()[2]),
        "line 13: val_2.JPEG has an annotation already",
    ),
    "no annotations": (lambda d: (d / "val/val_annotations.txt").write_text("\n"), "val_annotations.txt is empty"),
    "image without annotation": (
        lambda d: shutil.copy(d / "val/images/val_0.JPEG", d / "val/images/val_77.JPEG"),
        "has images without annotation: 'val_77.JPEG'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said(damage, folder):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ProbeError) as caught:
        tiny_imagenet.read(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder():
    with pytest.raises(ProbeError, match="/nowhere: no such folder"):
        tiny_imagenet.read(tiny_imagenet.Path("/nowhere"))


def test_a_subset_takes_as_many_of_every_class():
    images = tuple(LabelledImage(f"{label}/{k}", label) for label in range(4) for k in range(20))
    counts = Counter(image.label for image in subset(images, 30, seed=3))
    assert sorted(counts.values()) == [7, 7, 8, 8]
    assert subset(images, 30, seed=3) == subset(images, 30, seed=3) != subset(images, 30, seed=4)
    assert subset(images, 0, seed=3) == images
    uneven = (*images, *(LabelledImage(f"4/{k}", 4) for k in range(2)))
    assert Counter(image.label for image in subset(uneven, 42, seed=0)) == {0: 10, 1: 10, 2: 10, 3: 10, 4: 2}
    with pytest.raises(ProbeError, match="81 images are asked for, the data has 80"):
        subset(images, 81, seed=0)


def test_batches_are_full_in_order_and_name_what_cannot_be_read(folder):
    data = tiny_imagenet.read(folder)
    cut = folder / data.val[1].name
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / data.val[2].name).unlink()
    reader = Reader(folder, single_tile(32), workers=3)
    order = np.arange(len(data.val))[::-1]
    batches = list(reader.batches(data.val, 5, order))
    assert [batch.pixels.shape for batch in batches] == [(5, 32, 32, 3)] * 3
    weights = np.concatenate([batch.weights for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(weights, [1] * 9 + [0, 0, 1] + [0] * 3)
    np.testing.assert_array_equal(labels[weights > 0], [data.val[i].label for i in order if i not in (1, 2)])
    with Image.open(folder / data.val[11].name) as image:
        expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(batches[0].pixels[0], expected)
    assert reader.unreadable.keys() == {data.val[1].name, data.val[2].name}
    assert reader.unreadable[data.val[1].name].startswith("broken_image: ")
    assert reader.unreadable[data.val[2].name].startswith("missing_image: ")


def test_grey_images_become_three_equal_channels(generated):
    data = tiny_imagenet.read(generated)
    (grey,) = [p for p in data.train if p.name.endswith("n10000000_49.JPEG")]
    (batch,) = Reader(generated, single_tile(64)).batches([grey], 1)
    assert batch.weights.tolist() == [1]
    assert np.ptp(batch.pixels[0].astype(int), axis=-1).max() == 0
