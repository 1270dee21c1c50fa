"""The figure shows every tap of every model at its place."""

import dataclasses
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot
from PIL import Image

from tests.probe.made_up import made_up_result
from vr_jax.errors import UserError
from vr_jax.probe.plot import differences, draw, draw_axes, labels_of, position_of, tick_label

BASELINE, VISION_REMEMBER = made_up_result("base", refusion=False), made_up_result("vr", refusion=True)


def test_positions_have_the_order_of_the_forward_pass():
    taps = VISION_REMEMBER.taps
    assert sorted(taps, key=position_of) == list(taps)
    assert [tick_label(tap) for tap in taps][3:] == ["1", "1\n+VR", "4", "12"]


def test_two_models_in_one_figure(tmp_path):
    for suffix in ("svg", "png"):
        output = tmp_path / "figures" / f"probe.{suffix}"
        draw([BASELINE, VISION_REMEMBER], output, ["LLaVA", "LLaVA-VR"])
        assert [path.name for path in output.parent.glob(f"*{suffix}")] == [output.name], "no temporary file is left"
    assert "<!-- LLaVA-VR -->" in (tmp_path / "figures" / "probe.svg").read_text()
    with Image.open(tmp_path / "figures" / "probe.png") as image:
        assert image.size > (1000, 500)


def test_every_tap_is_drawn_at_its_place():
    """A model without a re-fusion block has no point where the other model has one behind that block."""
    figure, axes = pyplot.subplots()
    draw_axes(axes, [BASELINE, VISION_REMEMBER], ["one", "two"])
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2 and line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert [line.get_ydata()[4] for line in lines] == pytest.approx([55.0, 80.0])
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["encoder", "compressor", "projector", "1", "1\n+VR", "4", "12"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "chance"]
    pyplot.close(figure)


def test_differing_settings_are_listed():
    other = {**VISION_REMEMBER.settings, "data": {**VISION_REMEMBER.settings["data"], "train": 80}}
    assert differences([BASELINE, VISION_REMEMBER]) == []
    assert differences([BASELINE, dataclasses.replace(VISION_REMEMBER, settings=other)]) == ["data.train: 8, 80"]


def test_equal_labels_are_completed_by_their_paths():
    both, paths = [BASELINE, BASELINE], [Path("a/probe"), Path("b/probe")]
    assert labels_of(both, paths) == ["base (a/probe)", "base (b/probe)"]
    assert labels_of(both, paths, "one, two") == ["one", "two"]
    with pytest.raises(UserError, match=r"--labels has 1 name\(s\), but there are 2 result\(s\)"):
        labels_of(both, paths, "one")


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        draw([BASELINE], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.svg, \.png, \.pdf"):
        draw([BASELINE], tmp_path / "a.gif")
