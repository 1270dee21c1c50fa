"""TensorBoard's event files hold the numbers, images and tables that were given."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.training.trackers.events import read_events, values_of
from vr_jax.errors import UserError
from vr_jax.training.trackers import CaptionedImage, TrackedRun
from vr_jax.training.trackers.tensorboard import TensorBoardTracker


def png(width, height):
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def tracker(tmp_path):
    tracker = TensorBoardTracker()
    tracker.start(TrackedRun(workdir=tmp_path))
    return tracker


def test_numbers_of_validation_have_a_group_of_their_own(tracker, tmp_path):
    tracker.scalars(7, {"loss": 0.5, "loss/captions": 0.25, "validation/held_out/loss": 2.0})
    tracker.close()
    found = [(step, tag, value.simple_value) for step, tag, value in values_of(tmp_path / "tensorboard")]
    assert found == [(7, "train/loss", 0.5), (7, "train/loss/captions", 0.25), (7, "validation/held_out/loss", 2.0)]


def test_an_image_has_its_size_its_bytes_and_its_caption(tracker, tmp_path):
    captioned = [CaptionedImage(png(5, 3), "two\n*lines*"), CaptionedImage(png(2, 4))]
    tracker.images(4, "first_batch", captioned)
    tracker.close()
    first, caption, second = (value for _, _, value in values_of(tmp_path / "tensorboard"))
    assert [first.tag, caption.tag, second.tag] == ["first_batch/0", "first_batch/0/text_summary", "first_batch/1"]
    assert (first.image.width, first.image.height) == (5, 3)
    assert (second.image.width, second.image.height) == (2, 4)
    assert first.image.encoded_image_string == captioned[0].png
    assert caption.tensor.string_val == [b"    two\n    *lines*"]


def test_a_table_is_one_of_markdown_whose_cells_break_nothing(tracker, tmp_path):
    tracker.table(4, "replies", ["question", "score"], [["a | b\nc", 0.123456789], ["", None]])
    tracker.close()
    ((_, _, value),) = values_of(tmp_path / "tensorboard")
    lines = value.tensor.string_val[0].decode().splitlines()
    assert lines == ["| question | score |", "| --- | --- |", "| a \\| b c | 0.123457 |", "|  |  |"]


@pytest.mark.parametrize("resume_step", [0, 4])
def test_a_continued_run_tells_tensorboard_to_drop_what_is_computed_again(resume_step, tmp_path):
    """Also one that was killed before its first checkpoint, and begins anew."""
    tracker = TensorBoardTracker()
    tracker.start(TrackedRun(workdir=tmp_path, resume_step=resume_step, written_step=6))
    tracker.scalars(resume_step + 1, {"loss": 1.0})
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    starts = [event.step for event in read_events(file) if event.HasField("session_log")]
    assert starts == [resume_step + 1]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard"):
        TensorBoardTracker().start(TrackedRun(workdir=tmp_path))
