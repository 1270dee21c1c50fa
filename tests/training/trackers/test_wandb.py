"""Weights & Biases in offline mode: what is given is in the run's own file, and a continued run is the same run."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from vr_jax.settings import WandbSettings
from vr_jax.training.trackers import CaptionedImage, Trackers

wandb = pytest.importorskip("wandb", reason="needs wandb: pip install 'vr-jax[wandb]'")
WandbTracker = pytest.importorskip("vr_jax.training.trackers.wandb").WandbTracker


def png():
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), 200, np.uint8)).save(file, "png")
    return file.getvalue()


def records(folder):
    """The records of the file of a run.

    The file is a log of LevelDB behind 7 bytes of its own: blocks of 32 KiB, in which each piece of a record has a
    checksum of 4 bytes, its length in 2, and whether it is a whole record, its first part, a middle one or its last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # The process that writes the file ends.
    (path,) = folder.glob("run-*.wandb")
    content, found, record = path.read_bytes(), [], b""
    place = 7
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(record))
            record = b""
    return found


def history(folder):
    """What the run shows at each step: numbers by name, and of media the fields that describe them."""
    steps = {}
    for record in records(folder):
        if not record.HasField("history"):
            continue
        items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        shown = steps.setdefault(items[("_step",)], {})
        for (name, *field), value in items.items():
            if field:
                shown.setdefault(name, {})[field[0]] = value
            elif not name.startswith("_"):
                shown[name] = value
    return steps


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_a_run_and_its_continuation_are_one_run_whose_steps_are_shown_once(tmp_path):
    settings = WandbSettings(project="tests", group="a group", tags=("one", "two"))
    options = {"config": {"seed": 3}, "identity": "0123456789abcdef"}
    with Trackers(tmp_path, resume_step=0, others=[WandbTracker(settings)], **options) as trackers:
        trackers.page(0, "first_batch", "<html><body>tokens</body></html>")
        trackers.images(0, "first_batch", [CaptionedImage(png(), "a caption"), CaptionedImage(png())])
        for step in (1, 2, 3):
            trackers.write(step, {"loss": step / 2, "validation/held_out/loss": 1.0})
        trackers.table(3, "validation/replies", ["question", "score"], [["what?", 0.5], ["why?", None]])
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    steps = history(first)
    assert set(steps) == {0, 1, 2, 3}
    assert steps[2] == {"train/loss": 1.0, "validation/held_out/loss": 1.0}
    assert steps[0]["first_batch/page"]["_type"] == "html-file"
    assert steps[0]["first_batch/images"]["count"] == 2
    assert steps[0]["first_batch/images"]["captions"] == ["a caption", ""]
    assert steps[3]["validation/replies"]["nrows"] == 2
    media = {path.suffix for path in (first / "files" / "media").rglob("*") if path.is_file()}
    assert media == {".html", ".png", ".json"}

    # The run was killed behind step 3, and its last checkpoint is that of step 2.
    with Trackers(tmp_path, resume_step=2, others=[WandbTracker(settings)], **options) as trackers:
        for step in (3, 4):
            trackers.write(step, {"loss": step / 2})
    (second,) = set((tmp_path / "wandb").glob("offline-run-*")) - {first}
    assert history(second) == {4: {"train/loss": 2.0}}
    for folder in (first, second):
        (run,) = [record.run for record in records(folder) if record.HasField("run")]
        assert (run.run_id, run.project, run.run_group) == ("0123456789abcdef", "tests", "a group")
        assert list(run.tags) == ["one", "two"]
        assert run.display_name == tmp_path.name
        config = {item.key: item.value_json for item in run.config.update}
        assert config["seed"] == "3"


@pytest.mark.parametrize("error", [None, KeyError("of the run")])
def test_a_run_that_an_error_ends_counts_as_failed(error, tmp_path):
    try:
        with Trackers(tmp_path, resume_step=0, others=[WandbTracker(WandbSettings())], identity="f" * 16) as trackers:
            trackers.write(1, {"loss": 1.0})
            if error:
                raise error
    except KeyError:
        pass
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    codes = [record.exit.exit_code for record in records(folder) if record.HasField("exit")]
    assert codes == [1 if error else 0]


def test_a_service_that_does_not_answer_ends_no_training(tmp_path, monkeypatch, caplog):
    """Nobody is logged in, and the address is one that refuses every connection."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    tracker = WandbTracker(WandbSettings())
    with Trackers(tmp_path, resume_step=0, others=[tracker], identity="e" * 16) as trackers:
        trackers.write(1, {"loss": 1.0})
    (line,) = [message for message in caplog.messages if "the tracker" in message]
    assert line.startswith("the tracker wandb is off from now on, the training goes on: ")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
