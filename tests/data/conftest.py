"""Fixtures of the tests of the data package."""

from pathlib import Path

import pytest

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
