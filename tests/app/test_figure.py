"""The figures: the atlas holds every window, later images have their own weights, and texts are escaped."""

from __future__ import annotations

import html
import io
import json
import re

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.app.made_up import weights
from tests.app.test_windows import ANYRES
from tests.inference import tiny
from vr_jax.app.figure import SMALL, figures, figures_html
from vr_jax.evaluation import heat_png, of_image

SIZES = [(96, 48), (300, 100)]


@pytest.fixture(scope="module")
def found():
    return weights(ANYRES, SIZES, 9)


@pytest.fixture(scope="module")
def drawn(found):
    return figures(found, [tiny.png(*size) for size in SIZES], ANYRES)


def rgba(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_the_atlas_holds_every_window_of_its_image(found, drawn):
    for number, figure in enumerate(drawn):
        own = of_image(found, SIZES, number, ANYRES)
        assert len(figure.insertions) == len(own) == 2
        wide, high = figure.slot
        for insertion, reread in zip(figure.insertions, own, strict=True):
            atlas = rgba(insertion.atlas)
            for slot, window in enumerate(figure.windows):
                ratios = window.ratios(np.asarray(reread.weights))
                top, left = slot // figure.columns * high, slot % figure.columns * wide
                np.testing.assert_array_equal(atlas[top : top + high, left : left + wide], rgba(heat_png(ratios)))
                assert insertion.largest[slot] == pytest.approx(ratios.max())
                assert insertion.updates[slot] == pytest.approx(reread.update[window.tile, window.cell])


def test_titles_sizes_and_notes(drawn):
    assert [figure.title for figure in drawn] == ["Image 1 of 2", "Image 2 of 2"]
    assert [figure.size for figure in drawn] == SIZES
    assert [figure.insertions[0].map.label for figure in drawn] == ["after layer 1"] * 2
    assert all(one.map.note.startswith("largest weight ") for figure in drawn for one in figure.insertions)
    assert [figure.mime for figure in drawn] == ["image/png", "image/webp"]
    assert [figure.enlarged for figure in drawn] == [True, False]
    assert max(drawn[0].size) <= SMALL < max(drawn[1].size)


def test_the_script_gets_one_box_for_each_token(drawn):
    data = json.loads(drawn[0].script_data)
    assert len(data["boxes"]) == len(data["places"]) == len(data["patches"]) == len(drawn[0].windows) == 16
    assert len(data["insertions"][0]["updates"]) == 16
    assert data["boxes"][0][:2] == [0, pytest.approx(drawn[0].windows[0].box[1], abs=1e-5)]


def test_a_photograph_is_shown_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(tiny.png(60, 30))).save(buffer, "JPEG", exif=exif)
    (figure,) = figures(weights(ANYRES, [(30, 60)], 9), [buffer.getvalue()], ANYRES)
    assert figure.size == (30, 60)
    with Image.open(io.BytesIO(figure.image)) as shown:
        assert shown.size == (30, 60)
        assert not shown.getexif()


def test_an_image_without_vision_tokens_has_no_maps(drawn):
    empty = weights(ANYRES, [(96, 48)], 9)
    for one in empty:
        np.asarray(one.weights)[:] = 0
    (figure,) = figures(empty, [tiny.png(96, 48)], ANYRES)
    assert figure.insertions == ()
    assert "No vision token lies on this image" in figures_html([figure])


def test_the_html_holds_the_data_and_escapes_it(drawn):
    page = figures_html(drawn)
    held = re.findall(r'data-figure="([^"]*)"', page)
    assert [json.loads(html.unescape(one)) for one in held] == [json.loads(one.script_data) for one in drawn]
    assert page.count("<figure") == 2
    assert "<script" not in page
