"""Whole runs of the probe: what the heads learn, what is written, one device and eight, mistakes in the settings."""

import json

import jax
import numpy as np
import pytest

from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from tests.probe.conftest import LAYERS, QUICK
from vr_jax.errors import ConfigError, UserError
from vr_jax.evaluation import fingerprint
from vr_jax.inference import load_for_inference
from vr_jax.probe import output_folder, probe_settings, read_results, run_probe, tiny_imagenet
from vr_jax.probe.images import Reader
from vr_jax.probe.taps import QUESTION, one_tile, prompt_batch, taps_of
from vr_jax.probe.training import fit
from vr_jax.settings import ProbeSettings, TrainConfig, load_config
from vr_jax.sharding import make_mesh
from vr_jax.storage import directory_lock


@pytest.mark.slow  # The heads are trained for seconds.
def test_the_encoder_of_a_tiny_model_tells_the_classes_apart(result):
    found, _ = result
    by_name = {tap.name: tap for tap in found.taps}
    assert list(by_name) == [
        *("encoder", "compressor", "projector", "layer 1", "layer 1 + vision_remember", "layer 3"),
    ]
    assert found.chance == 0.25
    assert min(by_name["encoder"].accuracies) > 0.55
    assert by_name["encoder"].losses[0] < 0.8 * np.log(4)


@pytest.mark.slow  # It needs the heads of the test above.
def test_everything_that_decides_the_numbers_is_written(result, setting):
    found, folder = result
    assert read_results(folder) == found
    written = json.loads((folder / "results.json").read_text())
    assert written["settings"]["checkpoint"]["sha256"] == fingerprint(setting.checkpoint)
    assert written["settings"]["question"] == QUESTION
    assert written["settings"]["data"] | {"sha256": ""} == {
        **{"path": str(setting.data), "classes": 4, "train": 240, "val": 64, "sha256": ""},
    }
    assert written["settings"]["heads"]["lr"] == QUICK["lr"]
    assert written["settings"]["model"]["image"]["aspect_ratio"] == "square"
    encoder = written["taps"][0]
    assert (encoder["tokens"], encoder["width"]) == (36, 16)
    assert encoder["accuracy_mean"] == pytest.approx(np.mean(encoder["accuracies"]))
    assert encoder["accuracy_deviation"] == pytest.approx(np.std(encoder["accuracies"], ddof=1))


@pytest.mark.slow  # It needs the heads of the test above.
def test_unreadable_images_are_named_and_count_as_wrong_in_validation(result, setting):
    found, _ = result
    assert found.unreadable["train"].keys() == {setting.broken[0]}
    assert found.unreadable["val"].keys() == set(setting.broken[1:])
    for tap in found.taps:
        for accuracy in tap.accuracies:
            message = "accuracies are fractions of all 64 images, not of the 62 readable ones"
            assert accuracy * 64 == pytest.approx(round(accuracy * 64), abs=1e-9), message


@pytest.mark.slow  # Everything is compiled again for one device.
def test_one_device_agrees_with_eight(result, setting):
    """Two taps are enough, because their values depend on everything between them."""
    found, _ = result
    config = one_tile(tiny.config())
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = load_for_inference(setting.checkpoint, mesh, config=config)
    taps = [tap for tap in taps_of(config, LAYERS)[0] if tap.name in ("encoder", "layer 3")]
    data = tiny_imagenet.read(setting.data)
    prompt, reader = prompt_batch(loaded.processor, QUESTION), Reader(data.folder, config.image)
    with jax.set_mesh(mesh):
        alone = fit(loaded.model, prompt, taps, reader, data, setting.settings(), mesh, progress=False)
    assert len(alone.losses) == 2
    for tap in (one for one in found.taps if one.name in alone.losses):
        # Sums in another order move the parameters a little in each of the 32 updates.
        np.testing.assert_allclose(alone.losses[tap.name], tap.losses, rtol=2e-3, err_msg=tap.name)
        np.testing.assert_allclose(alone.correct[tap.name] / 64, tap.accuracies, atol=1.01 / 64, err_msg=tap.name)


def test_flags_win_over_the_config():
    config = TrainConfig.from_config_dict(
        {
            "model": tiny.config().to_dict(),
            "probe": {"epochs": 3, "layers": (1, 2), "checkpoint": "a", "lr": 0.1},
        }
    )
    settings = probe_settings({"epochs": 5, "data": "d", "layers": (2, 3), "checkpoint": None}, config)
    assert (settings.epochs, settings.layers, settings.lr, settings.checkpoint) == (5, (2, 3), 0.1, "a")
    assert probe_settings({}).epochs == 15
    # Random weights are those of the config's model, so the checkpoint of the config does not matter.
    assert probe_settings({"random": True, "output": "o"}, config).checkpoint is None
    assert probe_settings({"random": True, "checkpoint": "b"}, config).checkpoint == "b"


def test_results_lie_beside_the_checkpoint_by_default():
    assert str(output_folder(ProbeSettings(checkpoint="/run/model"))) == "/run/model/probe"
    assert str(output_folder(ProbeSettings(checkpoint="run/model", output="out"))) == "out"
    with pytest.raises(UserError, match="no output folder"):
        output_folder(ProbeSettings())


def test_the_config_of_the_demo_names_its_checkpoint():
    for variant, name in (("", "vr"), (":baseline", "base")):
        config = load_config(REPOSITORY / f"configs/probe_demo.py{variant}")
        assert probe_settings({"data": "d"}, config).checkpoint == f"runs/probe_{name}/model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint is missing: give a model directory"),
        ({"checkpoint": None, "random": True}, "--random without --checkpoint needs --config with a model"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
        ({"data": None}, "--data is missing: give the folder of tiny-imagenet-200"),
        ({"data": "/nowhere"}, "/nowhere: no such folder"),
        ({"layers": (1, 9)}, r"layers = \(1, 9\): expected increasing numbers from 1 to 3"),
        ({"batch_size": 63}, "batch_size = 63 is not divisible by 8"),
        ({}, "results.json exists; choose another --output, or replace it with --overwrite"),
        ({"output": "FILE"}, "config.json"),
    ],
    ids=str,
)
def test_mistakes_are_stated_before_the_training(setting, changes, message, tmp_path):
    if changes.get("output") == "FILE":
        changes = {"output": str(setting.checkpoint / "config.json")}
    elif changes:
        changes = {"output": str(tmp_path)} | changes
    else:
        (tmp_path / "results.json").write_text("{}")
        changes = {"output": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        run_probe(setting.settings(**changes), progress=False)


def test_settings_that_no_head_can_have():
    with pytest.raises(ConfigError, match=r"width = 30 is not divisible by config\.probe\.heads = 8"):
        ProbeSettings(width=30)
    with pytest.raises(ConfigError, match=r"epochs = 0: expected an integer >= 1"):
        probe_settings({"epochs": 0})


@pytest.mark.slow  # It needs the heads of the test above.
def test_a_folder_that_another_run_writes_to(setting, tmp_path):
    with directory_lock(tmp_path), pytest.raises(UserError, match=f"{tmp_path} is in use by another run"):
        run_probe(setting.settings(output=str(tmp_path), overwrite=True), progress=False)
