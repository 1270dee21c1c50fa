"""The generated stand-in has the layout of Tiny-ImageNet, is repeatable and overwrites nothing."""

from collections import Counter

import pytest
from PIL import Image

from vr_jax.errors import UserError
from vr_jax.probe.stand_in import CLASS_NAMES, TEXTURES, chosen_labels, write_stand_in


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


def test_the_stand_in_is_repeatable_and_never_overwrites(generated, tmp_path):
    write_stand_in(tmp_path / "again", classes=3, train=50, val=4)
    for path in sorted(generated.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(generated)).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="exists; choose another folder"):
        write_stand_in(generated, classes=3, train=1, val=1)
    with pytest.raises(UserError, match="classes = 1, train = 100, val = 25: expected 2 to 24 classes"):
        write_stand_in(tmp_path / "new", classes=1)
    assert not (tmp_path / "new").exists()


def test_classes_differ_in_colour_and_texture():
    """Neither colour nor texture alone tells the classes apart."""
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 24
    names = [CLASS_NAMES[k] for k in chosen_labels(8)]
    assert Counter(name.split()[0] for name in names) == {"red": 4, "green": 4}
    assert Counter(name.split(" ", 1)[1] for name in names) == dict.fromkeys(TEXTURES, 2)
