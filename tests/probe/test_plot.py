"""The figure and its command; results that cannot be read."""

import dataclasses
import json
import sys

import pytest
from PIL import Image

from tests.commands import run
from vr_jax.probe import plot
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.results import ProbeResult, TapResult, read_results, table, write_results


def tap(name, kind, layer=None, accuracies=(0.5, 0.6)):
    return TapResult(name, kind, layer, name, 9, 16, accuracies, (1.0, 1.1))


def result(label, *, refusion):
    taps = [tap("encoder", "encoder"), tap("compressor", "compressor"), tap("projector", "projector")]
    taps.append(tap("layer 1", "layer", 1))
    if refusion:
        taps.append(tap("layer 1 + vision_remember", "refusion", 1, (0.7, 0.9)))
    taps += [tap("layer 4", "layer", 4), tap("layer 12", "layer", 12)]
    data = {"classes": 4, "train": 8, "val": 10, "path": label}
    settings = {"data": data, "heads": {"lr": 1e-3}}
    return ProbeResult(label, settings, tuple(taps), {"x": "not there"}, {"train": {}, "val": {"a": "b"}}, (), {})


@pytest.fixture
def folders(tmp_path):
    for name, refusion in (("base", False), ("vr", True)):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, result(name, refusion=refusion))
    return [tmp_path / "base", tmp_path / "vr"]


def test_taps_stand_in_the_order_of_the_forward_pass():
    taps = result("vr", refusion=True).taps
    assert sorted(taps, key=plot.position_of) == list(taps)
    assert [plot._tick(one) for one in taps][3:] == ["1", "1\n+VR", "4", "12"]


def test_two_models_in_one_figure(folders, tmp_path, capsys):
    for suffix in ("svg", "png"):
        output = tmp_path / "figures" / f"probe.{suffix}"
        assert run("probe plot", *folders, output=output, labels="LLaVA, LLaVA-VR") == 0
        assert [path.name for path in output.parent.glob(f"*{suffix}")] == [output.name], "nothing temporary is left"
    with Image.open(tmp_path / "figures" / "probe.png") as image:
        assert image.size > (1000, 500)
    assert capsys.readouterr().err == ""


def test_what_is_drawn(monkeypatch):
    """Every tap of every model at its place; a model without re-fusion block skips the places of one with it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    base, vr = result("base", refusion=False), result("vr", refusion=True)
    plot._fill(axes, [base, vr], ["one", "two"])
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [list(line.get_xdata()) for line in lines if line.get_linestyle() == "-"] == [
        [0, 1, 2, 3, 5, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert [line.get_ydata()[4] for line in lines if line.get_linestyle() == "-"] == pytest.approx([55.0, 80.0])
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["encoder", "compressor", "projector", "1", "1\n+VR", "4", "12"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "chance"]
    pyplot.close(figure)


def test_results_of_different_settings_get_a_word(folders, tmp_path, capsys):
    other = result("vr", refusion=True)
    settings = {**other.settings, "data": {**other.settings["data"], "train": 80}}
    write_results(folders[1], dataclasses.replace(other, settings=settings))
    assert run("probe plot", *folders, output=tmp_path / "a.svg") == 0
    assert capsys.readouterr().err == "vr-jax probe plot: careful, the results differ in data.train: 8, 80\n"


def test_equal_labels_get_their_paths():
    both = [result("same", refusion=False)] * 2
    paths = [plot.Path("a/probe"), plot.Path("b/probe")]
    assert plot.labels_of(both, paths) == ["same (a/probe)", "same (b/probe)"]
    with pytest.raises(ProbeError, match=r"--labels has 1 name\(s\) for 2 result\(s\)"):
        plot.labels_of(both, paths, "one")


def test_without_matplotlib(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("probe plot", folders[0], output=tmp_path / "a.svg") == 2
    assert "matplotlib is not installed; pip install 'vr-jax[benchmarks]'" in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; expected a results.json"),
        ("{", "is not valid JSON"),
        ("[]", "holds no results of `vr-jax probe`"),
        ('{"format": "vr_jax probe", "version": 9}', "has version 9, this code reads version 1"),
        ('{"format": "vr_jax probe", "version": 1}', "is damaged (KeyError: 'taps')"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert run("probe plot", tmp_path / "results.json") == 2
    assert message in capsys.readouterr().err


def test_an_unknown_kind_of_file(folders, capsys):
    assert run("probe plot", folders[0], output="a.gif") == 2
    assert "expected a file name that ends in .svg, .png, .pdf" in capsys.readouterr().err


def test_written_and_read_back(folders):
    assert read_results(folders[1]) == result("vr", refusion=True)
    assert json.loads((folders[1] / "results.json").read_text())["chance"] == 0.25


def test_the_table():
    lines = table(result("vr", refusion=True)).splitlines()
    assert lines[0] == "vr: 4 classes, 8 training and 10 validation images"
    assert lines[6] == "layer 1 + vision_remember          9 x 16   80.0 ± 14.1 %"
    assert lines[9].split() == ["chance", "25.0", "%"]
    assert lines[10] == "left out: x (not there)"
    assert lines[11] == "1 val image(s) could not be read and count as wrong, e.g. a (b)"
