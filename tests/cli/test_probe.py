"""`vr-jax probe` as a user meets it: the table, the files, and one line for a mistake."""

import dataclasses

import pytest

from tests.commands import run
from tests.golden.discovery import REPOSITORY
from tests.probe.made_up import made_up_result
from vr_jax.cli.main import main
from vr_jax.probe import read_results, write_stand_in
from vr_jax.probe.results import write_results


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "data"
    write_stand_in(folder, classes=4, train=3, val=2)
    return folder


@pytest.mark.slow  # It compiles a model of its own; test_run.py trains heads on a stored one.
def test_random_weights_of_a_config(data, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    status = main(
        [
            *("probe", "--config=configs/probe_demo.py:baseline", "--random", f"--data={data}", f"--output={tmp_path}"),
            *("--config.probe.layers=(2,)", "--config.probe.seeds=1", "--config.probe.width=16", "--epochs=1"),
            *("--train_images=8", "--val_images=8", "--batch_size=8", "--label=tried out"),
        ]
    )
    out, err = capfd.readouterr()
    assert status == 0, err[-3000:]
    lines = out.splitlines()
    assert lines[0] == "tried out: 4 classes, 8 training and 8 validation images"
    assert [line.split("  ")[0] for line in lines[2:7]] == ["encoder", "compressor", "projector", "layer 2", "chance"]
    assert "2/2" in err, "there is no progress bar"
    found = read_results(tmp_path)
    assert found.settings["checkpoint"] == {"path": None, "sha256": None, "random": True}
    assert (tmp_path / "probe.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.svg", "results.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--checkpoint is missing: give a model directory"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
        ({"checkpoint": "x", "layers": "one"}, "layers[0] = 'one': expected an integer"),
        ({"checkpoint": "x", "epochs": 0}, "--epochs=0: expected an integer >= 1"),
        ({"checkpoint": "x", "width": 30}, "width = 30 is not divisible by config.probe.heads = 8"),
        ({"checkpoint": "x", "lr": -1.0}, "--lr=-1.0: expected a finite number >= 1e-30"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(data, capsys, flags, message):
    assert run("probe", data=data, **flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vr-jax probe: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_wrong_field_of_the_config_is_one_line(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert run("probe", **{"config": "configs/probe_demo.py", "config.probe.epoch": 1, "data": "x"}) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vr-jax probe: ")
    assert "'epoch'" in last


def test_a_figure_of_results_with_different_settings_comes_with_a_warning(tmp_path, capsys):
    base, other = made_up_result("base", refusion=False), made_up_result("vr", refusion=True)
    settings = {**other.settings, "data": {**other.settings["data"], "train": 80}}
    for name, result in (("base", base), ("vr", dataclasses.replace(other, settings=settings))):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, result)
    assert run("probe plot", tmp_path / "base", tmp_path / "vr", output=tmp_path / "a.svg", labels="LLaVA,VR") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'a.svg'}\n"
    assert err == "vr-jax probe plot: careful, the results differ in data.train: 8, 80\n"


def test_the_stand_in_is_written_and_described(tmp_path, capsys):
    assert run("probe stand_in", tmp_path / "new", classes=2, train=2, val=1) == 0
    assert capsys.readouterr().out == f"2 classes, 2 + 1 images each: {tmp_path / 'new'}\n"
    assert run("probe stand_in", tmp_path / "other", classes=1) == 2
    assert "--classes=1: expected an integer >= 2 and <= 24" in capsys.readouterr().err
