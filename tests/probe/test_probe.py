"""Whole runs: what is learnt, what is written, one device and eight, the command line and its mistakes."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from tests.probe.conftest import LAYERS, QUICK
from vr_jax.evaluation.main import fingerprint
from vr_jax.inference.loading import load_for_inference
from vr_jax.model.config import single_tile
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.head import make_heads
from vr_jax.probe.main import ProbeOptions, main, options_of
from vr_jax.probe.pictures import Reader
from vr_jax.probe.results import read_results
from vr_jax.probe.taps import QUESTION, one_tile, prompt_batch, taps_of
from vr_jax.probe.training import FitOptions, _count, fit
from vr_jax.sharding import make_mesh


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


def test_unreadable_pictures_are_named_and_validation_counts_them(result, setting):
    found, _ = result
    assert found.unreadable["train"].keys() == {setting.broken[0]}
    assert found.unreadable["val"].keys() == set(setting.broken[1:])
    for tap in found.taps:
        for accuracy in tap.accuracies:
            assert accuracy * 64 == pytest.approx(round(accuracy * 64), abs=1e-9), "of all 64, not of the 62 readable"


def test_an_unreadable_picture_is_wrong_whatever_the_head_says(setting):
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
    found, _ = result
    config = one_tile(tiny.config())
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = load_for_inference(setting.checkpoint, mesh, config=config)
    taps, _ = taps_of(config, LAYERS)
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
    for tap in found.taps:
        np.testing.assert_allclose(alone.losses[tap.name], tap.losses, rtol=2e-3, err_msg=tap.name)
        np.testing.assert_allclose(alone.correct[tap.name] / 64, tap.accuracies, atol=1.01 / 64, err_msg=tap.name)


def test_a_batch_that_the_mesh_cannot_cut(setting):
    assert main({"checkpoint": str(setting.checkpoint), "data": str(setting.data), "batch_size": 63}, None) == 1


def test_flags_win_over_the_recipe(setting):
    recipe = ConfigDict(
        {
            "model": tiny.config().to_dict(),
            "mesh": {"replica": 2, "fsdp": 4, "tensor": 1},
            "tokenizer": "demo",
            "probe": {"epochs": 3, "layers": (1, 2), "checkpoint": "a", "lr": 0.1},
        }
    )
    options = options_of({"epochs": 5, "data": "d", "layers": "2,3", "checkpoint": None}, recipe)
    assert (options.epochs, options.layers, options.lr, str(options.checkpoint)) == (5, (2, 3), 0.1, "a")
    assert (options.model, dict(options.mesh)) == (tiny.config(), {"replica": 2, "fsdp": 4, "tensor": 1})
    with pytest.raises(ProbeError, match=r"config\.probe: unknown field\(s\) \['epoch'\]; known: .*'epochs'"):
        options_of({"data": "d"}, {"probe": {"epoch": 3}})
    assert ProbeOptions().epochs == 15


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
        ({"epochs": 0}, "epochs = 0: expected an integer of at least 1"),
        ({"width": 30}, "width = 30 is not divisible by heads = 8"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"train_images": -1}, "train_images = -1: expected an integer of at least 0"),
        ({}, "holds a probe's results; choose another --output, or --overwrite them"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(setting, result, capsys, flags, message):
    given = {"checkpoint": str(setting.checkpoint), "data": str(setting.data)}
    assert main(given | flags, None) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vr_jax.probe: ")
    assert err.count("\n") == 1
    assert message in err


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vr_jax.probe", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_command_line_with_random_weights(setting, tmp_path):
    done = command(
        *("--config=configs/probe_demo.py:baseline", "--random", f"--data={setting.data}", f"--output={tmp_path}"),
        *("--config.probe.layers=(2,)", "--config.probe.seeds=1", "--epochs=1", "--train_images=8", "--val_images=8"),
        *("--batch_size=8", "--config.probe.width=16", "--label=tried out"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "tried out: 4 classes, 8 training and 8 validation pictures"
    assert [line.split("  ")[0] for line in lines[2:7]] == ["encoder", "compressor", "projector", "layer 2", "chance"]
    assert "2/2" in done.stderr, "no progress bar"
    found = read_results(tmp_path)
    assert found.settings["checkpoint"] == {"path": None, "sha256": None, "random": True}
    assert (tmp_path / "probe.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.svg", "results.json"]


def test_a_wrong_field_on_the_command_line():
    done = command("--config=configs/probe_demo.py", "--config.probe.epoch=1", "--data=x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "vr_jax.probe: --config.probe.epoch: config.probe has no field 'epoch'; did you mean 'epochs'?"
    )
