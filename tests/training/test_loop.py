"""The loop in this process: numbers written, continuing exactly, damaged checkpoints, other meshes, export."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import quick
from tests.training.tiny import PLAIN, STEPS, NoiseIterator, noise_inputs, plain_run, series, twenty_steps
from vr_jax import sharding
from vr_jax.errors import ConfigError, UserError
from vr_jax.model_directory import load_model
from vr_jax.training import checksums, loop
from vr_jax.training.checkpoint import Checkpoints
from vr_jax.training.inputs import Inputs
from vr_jax.training.optimizer import make_optimizer, make_schedule
from vr_jax.training.state import ModelTree, abstract_state
from vr_jax.training.stopping import Preempted
from vr_jax.training.trackers import read_metrics

pytestmark = pytest.mark.usefixtures("shared_programs")

OTHER_MESH = {"mesh.replica": 2, "mesh.tensor": 2}


class Crash(BaseException):
    """Not an Exception, so nothing may handle it: the nearest thing to a kill within one process."""


def crash():
    raise Crash


class InterruptedIterator(NoiseIterator):
    """Batches of noise; something happens before one of them."""

    def __init__(self, *args, number, happening):
        super().__init__(*args)
        self.chosen, self.happening = number, happening

    def __next__(self):
        if self.number == self.chosen:
            self.happening()
        return super().__next__()


def interrupted_inputs(number, happening):
    return lambda config, mesh, workdir: Inputs(
        InterruptedIterator(config.batch.rows, number=number, happening=happening), 1000, None
    )


def arrays(workdir):
    """The exported model's arrays."""
    return ModelTree(PLAIN).flatten(load_model(workdir / "model"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run on 8 devices, with its checkpoints."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(twenty_steps(), workdir, open_inputs=noise_inputs())
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    return workdir


def test_every_step_is_written(whole):
    records = list(read_metrics(whole / "metrics.jsonl"))
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    first = records[0]
    assert set(first) == {
        *("step", "loss", "lr", "grad_norm", "samples", "tokens", "targets", "tiles"),
        *(f"{kind}_norm/{part}" for kind in ("param", "update") for part in ("decoder", "projector")),
        *("seconds", "tokens_per_s", "samples_per_s", "data_wait"),  # no mfu: the CPU's peak is not in the table
    }
    assert first["loss"] == pytest.approx(np.log(64), rel=0.05)
    assert first["samples"] == 16
    assert all(r["tokens_per_s"] == pytest.approx(r["tokens"] / r["seconds"]) for r in records)
    assert all(0 <= r["data_wait"] <= 1 for r in records)


def test_a_metric_that_the_update_adds_is_written(tmp_path, monkeypatch):
    build = loop.build_program

    def with_metric(*arguments):
        program = build(*arguments)

        def step(state, batch):
            state, metrics = program.step(state, batch)
            return state, metrics | {"further": metrics["loss"] + metrics["lr"]}

        return dataclasses.replace(program, step=step)

    monkeypatch.setattr(loop, "build_program", with_metric)
    loop.train(twenty_steps(), tmp_path, open_inputs=noise_inputs())
    assert all(r["further"] == pytest.approx(r["loss"] + r["lr"]) for r in read_metrics(tmp_path / "metrics.jsonl"))


def test_an_update_that_reads_from_the_host_is_refused(tmp_path, monkeypatch):
    """It would slow every update down without a sign of it."""
    build = loop.build_program

    def with_transfer(*arguments):
        program = build(*arguments)
        return dataclasses.replace(program, step=lambda state, batch: program.step(state, jax.device_get(batch)))

    monkeypatch.setattr(loop, "build_program", with_transfer)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.train(twenty_steps(), tmp_path, open_inputs=noise_inputs())


def test_a_run_that_was_asked_to_stop_and_crashed_continues_bit_for_bit(whole, tmp_path):
    """SIGTERM saves the step that it reaches; a crash loses at most the steps since the last save."""
    config = twenty_steps()
    asking = interrupted_inputs(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match=r"saved step (6|7) of 20; the same command continues"):
        loop.train(config, tmp_path, open_inputs=asking)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps()[-1] in (6, 7)
    with pytest.raises(Crash):
        loop.train(config, tmp_path, open_inputs=interrupted_inputs(12, crash))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps()[-1] == 12
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    assert series(tmp_path) == series(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), arrays(whole))


@pytest.mark.slow  # Muon's update is a program of its own.
def test_muon_trains_on_eight_devices_and_continues_bit_for_bit(whole, tmp_path):
    """Its state, which has no Adam moments for matrices, is sharded, saved and restored."""
    config = twenty_steps(**{"optimizer.name": "muon"})
    loop.train(config, tmp_path / "whole", open_inputs=noise_inputs())
    with pytest.raises(Crash):
        loop.train(config, tmp_path / "resumed", open_inputs=interrupted_inputs(12, crash))
    loop.train(config, tmp_path / "resumed", open_inputs=noise_inputs())
    assert series(tmp_path / "resumed") == series(tmp_path / "whole") != series(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "resumed"), arrays(tmp_path / "whole"))


def test_the_last_and_the_best_are_kept(whole):
    losses = dict(s[:2] for s in series(whole))
    with Checkpoints(whole) as checkpoints:
        means = {end: np.mean([losses[i] for i in range(end - 3, end + 1)]) for end in (4, 8, 12, 16, 20)}
        best = min(means, key=means.get)
        assert checkpoints.best_step() == best
        assert set(checkpoints.steps()) == {12, 16, 20} | {best}


@pytest.mark.parametrize("damage", quick(["truncated", "flipped", "missing", "metadata"], "flipped", "metadata"))
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(whole, copy, damage, caplog):
    folder = copy / "checkpoints" / "20" / "state"
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        file = folder / "_METADATA"
        file.write_text("{")
    shutil.rmtree(copy / "model")
    loop.train(twenty_steps(), copy, open_inputs=noise_inputs())
    reports = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert len(reports) == 1
    assert str(file) in reports[0]
    assert (copy / "checkpoints_damaged" / "20").is_dir()
    assert "continuing from step 16" in caplog.text
    assert series(copy) == series(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(copy), arrays(whole))


def test_a_checkpoint_without_checksums_does_not_count(copy, caplog):
    """A kill between Orbax's commit and the checksums; with no checkpoint that counts, the run starts anew."""
    (copy / "checkpoints" / "20" / "checksums.process_0.json").unlink()
    loop.train(twenty_steps(), copy, open_inputs=noise_inputs())
    assert "checkpoint 20 is not complete" in caplog.text
    assert "continuing from step 16" in caplog.text
    for record in (copy / "checkpoints").glob("*/checksums.process_0.json"):
        record.unlink()
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore_newest(None) is None


@pytest.mark.parametrize(
    ("version", "advice"),
    [(1, "continue with the vr_jax that wrote it"), (3, "update vr_jax"), (None, "format version 1")],
)
def test_a_checkpoint_of_another_format_is_refused_by_its_version(copy, version, advice):
    folder = copy / "checkpoints" / "20"
    path = folder / "run" / "metadata"
    run = json.loads(path.read_text())
    assert (run["format"], run["version"]) == ("vr_jax checkpoint", 2)
    del run["format" if version is None else "version"]
    path.write_text(json.dumps(run if version is None else run | {"version": version}))
    checksums.write_record(folder)
    with pytest.raises(UserError, match=f"20 has format version {version or 1}, this vr_jax reads 2; .*") as error:
        loop.train(twenty_steps(), copy, open_inputs=noise_inputs())
    assert advice in str(error.value)


def test_the_run_is_described_at_every_start(whole, copy):
    """Settings, versions, mesh and the table of parameters; a continuation adds to what is there."""
    (first,) = json.loads((whole / "run.json").read_text())
    assert first["config"] == twenty_steps().to_dict()
    assert (first["first_step"], first["total_steps"], first["processes"]) == (1, 20, 1)
    assert first["versions"]["jax"] == jax.__version__
    assert first["mesh"] == {"replica": 1, "fsdp": 8, "tensor": 1}
    table = (whole / first["parameters"]).read_text()
    lines = {line.split()[0]: line.split() for line in table.splitlines()[1:] if line}
    assert lines["projector.fc1.kernel"][-1] == "trained"
    assert lines["encoder.patch_embed.kernel"][-1] == "frozen"
    tree = ModelTree(PLAIN)
    assert set(tree.shapes) <= set(lines)
    total = sum(np.prod(leaf.shape) for leaf in tree.shapes.values())
    assert table.strip().endswith(f"{total:.0f} in all")

    shutil.rmtree(copy / "checkpoints" / "20")
    loop.train(twenty_steps(**{"checkpoint.every": 5}), copy, open_inputs=noise_inputs())
    starts = json.loads((copy / "run.json").read_text())
    assert starts[0] == first
    assert (starts[1]["first_step"], starts[1]["config"]["checkpoint"]["every"]) == (17, 5)
    assert starts[1]["parameters"] == first["parameters"], "the axes of the shardings are the same"
    assert (copy / "parameters.txt").read_text() == table


def test_all_checkpoints_damaged_is_an_error_and_not_a_fresh_start(copy):
    for folder in (copy / "checkpoints").iterdir():
        if folder.is_dir():
            (folder / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="were damaged"):
        loop.train(twenty_steps(), copy, open_inputs=noise_inputs())


@pytest.mark.parametrize("devices", quick([4, 2, 1], 2))
def test_restores_from_eight_devices_onto_fewer(whole, devices):
    tree, config = ModelTree(PLAIN), twenty_steps()
    trainable = tree.trainable(config.trainable)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, STEPS), trainable)

    def restore(mesh):
        with Checkpoints(whole) as checkpoints:
            return checkpoints.restore_newest(abstract_state(tree, optimizer, trainable, mesh)).state

    eight = restore(sharding.make_mesh(fsdp=8))
    fewer = restore(sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices]))
    jax.tree.map(np.testing.assert_array_equal, fewer, eight)
    kernel = "decoder.stages.0.mlp.up.kernel"
    assert len(eight.params[kernel].sharding.device_set) == 8
    assert len(fewer.params[kernel].sharding.device_set) == devices
    assert int(fewer.step) == STEPS


@pytest.mark.slow  # It compiles for another mesh; test_step.py compares meshes.
def test_another_mesh_continues_with_the_same_losses(whole, copy):
    """8 devices wrote step 16; replica 2 x fsdp 2 x tensor 2 continues."""
    shutil.rmtree(copy / "checkpoints" / "20")
    loop.train(twenty_steps(**OTHER_MESH), copy, open_inputs=noise_inputs())
    got, expected = (np.asarray(series(d))[16:] for d in (copy, whole))
    assert len(got) == 4
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_another_model_does_not_continue_a_run(copy):
    config = twenty_steps(**{"model.decoder.intermediate_size": 72})
    with pytest.raises(UserError) as stop:
        loop.train(config, copy, open_inputs=noise_inputs())
    assert stop.value.exit_code == 2
    message = str(stop.value)
    assert "mlp.down.kernel: found (1, 64, 32), expected (1, 72, 32)" in message
    assert (copy / "checkpoints" / "20").is_dir()


def test_changed_settings_are_logged_when_a_run_continues(copy, caplog):
    loop.train(twenty_steps(**{"checkpoint.every": 5}), copy, open_inputs=noise_inputs())
    assert "config.checkpoint.every was 4 when the checkpoint was written, now 5" in caplog.text


def test_the_export_starts_the_next_phase(whole, tmp_path, caplog):
    """Phase 2 from phase 1: all parameters taken, a fresh optimizer; a second directory of the same is refused."""
    config = twenty_steps(
        **{"init_from": str(whole / "model"), "steps": 1, "trainable": ("projector.*",), "frozen_dtype": "float32"},
        **{"optimizer.lr": 1e-20},
    )
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    assert "initialised: nothing" in caplog.text
    before, after = arrays(whole), arrays(tmp_path)
    # One step at a learning rate of 1e-20 changes nothing that float32 shows beside values that are not 0.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-19), after, before)
    narrow = twenty_steps(**{"init_from": str(whole / "model"), "model.decoder.intermediate_size": 72})
    with pytest.raises(UserError, match="the parameters do not fit the config; set the sections"):
        loop.train(narrow, tmp_path / "narrow", open_inputs=noise_inputs())
    assert not (tmp_path / "narrow" / "checkpoints").exists()
    with pytest.raises(UserError, match="/nowhere is not a model directory"):
        loop.train(twenty_steps(init_from="/nowhere"), tmp_path / "other", open_inputs=noise_inputs())
    assert not (tmp_path / "other").exists()


def test_export_only_writes_the_newest_checkpoint(whole, copy):
    shutil.rmtree(copy / "model")
    config = twenty_steps(tokenizer="demo")
    loop.export_newest(config, copy)
    jax.tree.map(np.testing.assert_array_equal, arrays(copy), arrays(whole))
    assert (copy / "model" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="no checkpoint to export"):
        loop.export_newest(config, copy / "empty")
    assert not (copy / "empty").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 12},
            r"^config\.steps = 12: the checkpoint in .* is at step 20, beyond the end of the run",
        ),
        (
            {"steps": 0, "samples_per_step": 250},
            r"^config\.epochs = 1 of 1000 samples, which are 4 updates: .* step 20",
        ),
    ],
)
def test_a_run_that_would_end_before_its_checkpoint_is_refused(copy, changes, message):
    shutil.rmtree(copy / "model")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message):
        loop.train(twenty_steps(**changes), copy, open_inputs=noise_inputs())
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())
    assert not (copy / "model").exists()
    assert len(json.loads((copy / "run.json").read_text())) == 1
    assert len(series(copy)) == STEPS


def test_a_finished_run_says_so_and_exports_its_model(whole, copy, caplog):
    shutil.rmtree(copy / "model")
    loop.train(twenty_steps(), copy, open_inputs=noise_inputs())
    assert "finished: step 20 is the last of the run" in caplog.text
    assert series(copy) == series(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(copy), arrays(whole))


def test_a_run_begins_with_what_a_reader_of_the_log_asks_for(tmp_path, caplog):
    config = plain_run(**{"steps": 1, "batch.rows": 4, "samples_per_step": 8, "batch.raise_rows": "linear_lr"})
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    chosen = "by the rule: fsdp = 8, all devices; replica takes the rest"
    assert f"devices: 8 x cpu; mesh replica 1 x fsdp 8 x tensor 1, {chosen}" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())[0]["mesh_rule"] == chosen
    assert "parameters: 0.01 M trained, kept in float32; 0.00 M frozen, kept in bfloat16" in caplog.text
    assert "computed in float32, norms, softmax and loss in float32" in caplog.text
    pieces = "in 8 pieces of the mesh (replica x fsdp)"
    assert f"an update: 8 rows of 24 tokens and 2 tiles {pieces}, about 16 samples" in caplog.text
    rule = "learning rate 0.003 for 8 samples per update is 0.006 for 16 (config.batch.raise_rows = 'linear_lr')"
    assert rule in caplog.text
    assert rule in json.loads((tmp_path / "run.json").read_text())[0]["batch"]
    assert "steps 1..1, 0.02 epochs of 1000 samples" in caplog.text
    assert next(read_metrics(tmp_path / "metrics.jsonl"))["lr"] == pytest.approx(6e-3)


@pytest.mark.slow  # Twenty-five updates with a program of their own.
def test_updates_that_hold_other_samples_than_the_settings_say_are_reported_once(tmp_path, caplog):
    """1000 samples at 40 per update would be 25 updates; the rows hold 16."""
    config = plain_run(steps=0, samples_per_step=40, **{"checkpoint.every": 50})
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    (record,) = (one for one in caplog.records if "an update holds" in one.getMessage())
    assert "16.0 samples where config.samples_per_step = 40: the run will see 0.40 epochs" in record.getMessage()


@pytest.mark.slow
def test_a_profile_of_chosen_steps(tmp_path):
    config = twenty_steps(**{"profile.first_step": 2, "profile.steps": 1})
    loop.train(config, tmp_path, open_inputs=noise_inputs())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_tensorboard_has_the_numbers(tmp_path):
    loop.train(twenty_steps(tensorboard=True), tmp_path, open_inputs=noise_inputs())
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train/loss", b"train/lr", b"train/grad_norm", b"train/tokens_per_s", b"train/data_wait"):
        assert content.count(name) == STEPS


def test_frozen_parameters_are_exported_in_their_own_precision(whole):
    exported = arrays(whole)
    assert exported["encoder.patch_embed.kernel"].dtype == jnp.bfloat16
    assert exported["projector.fc1.kernel"].dtype == jnp.float32
