"""Whole runs: what is learnt, what is written, one device and eight, the command line and its mistakes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.commands import run
from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from tests.probe.conftest import LAYERS, QUICK
from vr_jax.cli.main import main
from vr_jax.evaluation.evaluate import fingerprint
from vr_jax.inference import load_for_inference
from vr_jax.model.config import single_tile
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.head import make_heads
from vr_jax.probe.images import Reader
from vr_jax.probe.main import ProbeOptions, options_of
from vr_jax.probe.main import run as probe
from vr_jax.probe.results import read_results
from vr_jax.probe.taps import QUESTION, one_tile, prompt_batch, taps_of
from vr_jax.probe.training import FitOptions, _count, fit
from vr_jax.settings import TrainConfig, load_config
from vr_jax.sharding import ShardingError, make_mesh
from vr_jax.storage import directory_lock


def test_the_encoder_of_a_tiny_model_tells_the_classes_apart(result):
    found, _ = result
    by_name = {tap.name: tap for tap in found.taps}
    assert list(by_name) == [
        *("encoder", "compressor", "projector", "layer 1", "layer 1 + vision_remember", "layer 3"),
    ]
    assert found.chance == 0.25
    assert min(by_name["encoder"].accuracies) > 0.55
    assert by_name["encoder"].losses[0] < 0.8 * np.log(4)


def test_everything_that_decides_the_numbers_is_written(result, setting):
    found, folder = result
    assert read_results(folder) == found
    written = json.loads((folder / "results.json").read_text())
    assert written["settings"]["checkpoint"]["sha256"] == fingerprint(setting.checkpoint)
    assert written["settings"]["data"] | {"sha256": ""} == {
        **{"path": str(setting.data), "classes": 4, "train": 240, "val": 64, "sha256": ""},
    }
    assert written["settings"]["heads"]["lr"] == QUICK["lr"]
    assert written["settings"]["model"]["image"]["aspect_ratio"] == "square"
    encoder = written["taps"][0]
    assert (encoder["tokens"], encoder["width"]) == (36, 16)
    assert encoder["accuracy_mean"] == pytest.approx(np.mean(encoder["accuracies"]))
    assert encoder["accuracy_spread"] == pytest.approx(np.std(encoder["accuracies"], ddof=1))


def test_unreadable_images_are_named_and_validation_counts_them(result, setting):
    found, _ = result
    assert found.unreadable["train"].keys() == {setting.broken[0]}
    assert found.unreadable["val"].keys() == set(setting.broken[1:])
    for tap in found.taps:
        for accuracy in tap.accuracies:
            assert accuracy * 64 == pytest.approx(round(accuracy * 64), abs=1e-9), "of all 64, not of the 62 readable"


def test_an_unreadable_image_is_wrong_whatever_the_head_says(setting):
    data = tiny_imagenet.read(setting.data)
    (batch,) = Reader(data.folder, single_tile(24)).batches(data.val, 72)
    head = make_heads(5, 4, jax.numpy.arange(1), width=8, heads=2)
    right = 0
    for label in range(4):
        head.classifier.bias[...] = 1e6 * jax.nn.one_hot(np.array([label]), 4)
        counted = _count({"x": head}, {"x": np.ones((72, 2, 5), np.float32)}, batch.labels, batch.weights)
        assert counted["x"] <= 16
        right += int(counted["x"][0])
    assert right == 62, "each of the readable ones is right once, the others and the filling never"


def test_one_device_agrees_with_eight(result, setting):
    """Of two taps, what the others compute on the way included."""
    found, _ = result
    config = one_tile(tiny.config())
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = load_for_inference(setting.checkpoint, mesh, config=config)
    taps = [tap for tap in taps_of(config, LAYERS)[0] if tap.name in ("encoder", "layer 3")]
    data = tiny_imagenet.read(setting.data)
    options = FitOptions(**{name: value for name, value in QUICK.items() if name != "layers"})
    with jax.set_mesh(mesh):
        alone = fit(
            loaded.model,
            prompt_batch(loaded.processor, QUESTION),
            taps,
            Reader(data.folder, config.image),
            data.train,
            data.val,
            4,
            options,
            mesh,
            progress=False,
        )
    assert len(alone.losses) == 2
    for tap in (one for one in found.taps if one.name in alone.losses):
        np.testing.assert_allclose(alone.losses[tap.name], tap.losses, rtol=2e-3, err_msg=tap.name)
        np.testing.assert_allclose(alone.correct[tap.name] / 64, tap.accuracies, atol=1.01 / 64, err_msg=tap.name)


def test_a_batch_that_the_mesh_cannot_cut(setting):
    assert run("probe", checkpoint=setting.checkpoint, data=setting.data, batch_size=63) == 2


def test_flags_win_over_the_config(setting):
    config = TrainConfig.from_config_dict(
        {
            "model": tiny.config().to_dict(),
            "mesh": {"replica": 2, "fsdp": 4, "tensor": 1},
            "tokenizer": "demo",
            "probe": {"epochs": 3, "layers": (1, 2), "checkpoint": "a", "lr": 0.1},
        }
    )
    options = options_of({"epochs": 5, "data": "d", "layers": "2,3", "checkpoint": None}, config)
    assert (options.epochs, options.layers, options.lr, str(options.checkpoint)) == (5, (2, 3), 0.1, "a")
    assert (options.model, dict(options.mesh)) == (tiny.config(), {"replica": 2, "fsdp": 4, "tensor": 1})
    assert ProbeOptions().epochs == 15
    # Random weights are those of the config's model, not of the size of its checkpoint, which need not be there.
    assert options_of({"data": "d", "random": True, "output": "o"}, config).checkpoint is None
    assert str(options_of({"data": "d", "random": True, "checkpoint": "b"}, config).checkpoint) == "b"


def test_the_config_of_the_demo_knows_its_checkpoint():
    for variant, name in (("", "vr"), (":baseline", "base")):
        options = options_of({"data": "d"}, load_config(REPOSITORY / f"configs/probe_demo.py{variant}"))
        assert options.checkpoint == Path(f"runs/probe_{name}/model")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"checkpoint": None}, "--checkpoint is missing: a model directory; or --random"),
        ({"checkpoint": None, "random": True}, "--random without --checkpoint needs a --config with a model"),
        ({"checkpoint": "/nowhere"}, "/nowhere is not a model directory"),
        ({"data": None}, "--data is missing: the folder of tiny-imagenet-200"),
        ({"data": "/nowhere"}, "/nowhere: no such folder"),
        ({"layers": "1,9"}, "layers (1, 9): expected increasing numbers in 1..3"),
        ({"layers": "one"}, "layers 'one': expected numbers with commas between"),
        ({"epochs": 0}, "--epochs=0: expected an integer >= 1"),
        ({"width": 30}, "width = 30 is not divisible by heads = 8"),
        ({"lr": -1.0}, "--lr=-1.0: expected a finite number > 0"),
        ({"train_images": -1}, "--train_images=-1: expected an integer >= 0"),
        ({}, "probe/results.json is there already; choose another --output, or --overwrite it"),
        ({"output": "FILE"}, "is not a folder; choose another one"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(setting, result, capsys, flags, message):
    given = {"checkpoint": str(setting.checkpoint), "data": str(setting.data)} | flags
    if given.get("output") == "FILE":
        given["output"] = setting.checkpoint / "config.json"
    assert run("probe", **given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vr-jax probe: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_mesh_that_does_not_exist(setting):
    with pytest.raises(ShardingError, match=r"config\.mesh has no axis data: expected replica, fsdp, tensor"):
        probe(options_of({"checkpoint": setting.checkpoint, "data": setting.data}, {"mesh": {"fsdp": -1, "data": 1}}))


def test_a_folder_that_another_run_writes_to(setting, tmp_path, capsys):
    flags = {"checkpoint": str(setting.checkpoint), "data": str(setting.data), "output": tmp_path}
    with directory_lock(tmp_path):
        assert run("probe", **flags, overwrite=True) == 2
    assert f"{tmp_path} is in use by another run" in capsys.readouterr().err


def test_the_command_line_with_random_weights(setting, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    status = main(
        [
            "probe",
            *("--config=configs/probe_demo.py:baseline", "--random", f"--data={setting.data}", f"--output={tmp_path}"),
            *(
                "--config.probe.layers=(2,)",
                "--config.probe.seeds=1",
                "--epochs=1",
                "--train_images=8",
                "--val_images=8",
            ),
            *("--batch_size=8", "--config.probe.width=16", "--label=tried out"),
        ]
    )
    out, err = capfd.readouterr()
    assert status == 0, err[-3000:]
    lines = out.splitlines()
    assert lines[0] == "tried out: 4 classes, 8 training and 8 validation images"
    assert [line.split("  ")[0] for line in lines[2:7]] == ["encoder", "compressor", "projector", "layer 2", "chance"]
    assert "2/2" in err, "no progress bar"
    found = read_results(tmp_path)
    assert found.settings["checkpoint"] == {"path": None, "sha256": None, "random": True}
    assert (tmp_path / "probe.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.svg", "results.json"]


def test_a_wrong_field_on_the_command_line(capfd, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert main(["probe", "--config=configs/probe_demo.py", "--config.probe.epoch=1", "--data=x"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("vr-jax probe: ")
    assert "'epoch'" in last
