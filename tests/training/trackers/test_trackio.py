"""trackio on this machine: what is given is in its database, and a continued run is the same run."""

import io

import numpy as np
import pytest
from PIL import Image

from vr_jax.settings import TrackioSettings
from vr_jax.training.trackers import CaptionedImage, Trackers

REASON = "needs trackio: pip install 'vr-jax[trackio]'"


def png():
    file = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), 200, np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def tracker_class(tmp_path, monkeypatch):
    """The tracker, whose library takes its folder from the environment when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason=REASON)
    for module in ("trackio.utils", "trackio.sqlite_storage", "trackio"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    del trackio
    return pytest.importorskip("vr_jax.training.trackers.trackio").TrackioTracker


def test_a_run_and_its_continuation_are_one_run_whose_steps_are_shown_once(tracker_class, tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    settings = TrackioSettings(project="tests")
    options = {"config": {"seed": 3}, "identity": "0123456789abcdef"}
    with Trackers(tmp_path / "run", resume_step=0, others=[tracker_class(settings)], **options) as trackers:
        trackers.page(0, "first_batch", "<html><body>tokens</body></html>")
        trackers.images(0, "first_batch", [CaptionedImage(png(), "a caption")])
        for step in (1, 2, 3):
            trackers.write(step, {"loss": step / 2, "validation/held_out/loss": 1.0})
        trackers.table(3, "validation/replies", ["question", "score"], [["what?", 0.5], ["why?", None]])
    # The run was killed behind step 3, and its last checkpoint is that of step 2.
    with Trackers(tmp_path / "run", resume_step=2, others=[tracker_class(settings)], **options) as trackers:
        for step in (3, 4):
            trackers.write(step, {"loss": step / 2})

    assert SQLiteStorage.get_runs("tests") == ["run-0123456789abcdef"]
    logs = SQLiteStorage.get_logs("tests", "run-0123456789abcdef")
    losses = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert [log["validation/held_out/loss"] for log in logs if "validation/held_out/loss" in log] == [1.0] * 3
    media = {name: value["_type"] for log in logs for name, value in log.items() if isinstance(value, dict)}
    assert media == {
        "first_batch/page": "trackio.html",
        "first_batch/0": "trackio.image",
        "validation/replies": "trackio.table",
    }
    (one,) = (log["first_batch/0"] for log in logs if "first_batch/0" in log)
    assert one["caption"] == "a caption"
