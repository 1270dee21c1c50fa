"""Fixtures of the tests of the data package."""

from pathlib import Path

import PIL
import pytest
from PIL import Image

from tests.data.samples import png
from vr_jax.data.demo.tokenizer import demo_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the image folder `images`, which contains 0.png, 1.png and 2.png."""
    (tmp_path / "images").mkdir()
    for k in range(3):
        (tmp_path / "images" / f"{k}.png").write_bytes(png(seed=k))
    return tmp_path


@pytest.fixture
def pillow_13(monkeypatch):
    """Gives Pillow's own `resize` the order of passes of version 13, for references that call it.

    Older versions resize along the rows first, always. Our code makes the passes one by one, so this changes nothing
    in it.
    """
    if int(PIL.__version__.partition(".")[0]) >= 13:
        return
    one_version = Image.Image.resize

    def resize(self, size, resample=None, box=None, reducing_gap=None):
        (width, height), (new_width, new_height) = self.size, size
        if box is None and new_height < height and height - new_height > 2 * (width - new_width):
            self = one_version(self, (width, new_height), resample)
        return one_version(self, size, resample, box, reducing_gap)

    monkeypatch.setattr(Image.Image, "resize", resize)
