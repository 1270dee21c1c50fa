"""A run has all its trackers as one: each gets everything once, and one that fails ends no training."""

import logging

import pytest

from vr_jax.errors import UserError
from vr_jax.training.trackers import CaptionedImage, Tracker, Trackers, read_metrics


class Recording(Tracker):
    """Keeps its calls, and fails at the call of a name."""

    def __init__(self, name="recording", fails=""):
        self.name, self.fails, self.calls = name, fails, []

    def _call(self, method, *arguments):
        self.calls.append((method, *arguments))
        if method == self.fails:
            raise ConnectionError(f"no network\nwhile {method}")

    def start(self, run):
        self._call("start", run.resume_step, run.written_step, dict(run.config))

    def scalars(self, step, values):
        self._call("scalars", step, dict(values))

    def images(self, step, tag, captioned):
        self._call("images", step, tag, list(captioned))

    def table(self, step, tag, columns, rows):
        self._call("table", step, tag, list(columns), list(rows))

    def page(self, step, tag, html):
        self._call("page", step, tag, html)

    def close(self, *, failed=False):
        self._call("close", failed)


def use(trackers):
    trackers.page(0, "first_batch", "<p>")
    trackers.images(0, "first_batch", [CaptionedImage(b"png", "caption")])
    for step in (1, 2):
        trackers.write(step, {"loss": step / 2, "mfu": None})
    trackers.table(2, "replies", ["a"], [["b"]])


def test_a_tracker_gets_everything_once_and_numbers_that_are_known(tmp_path):
    one = Recording()
    with Trackers(tmp_path, resume_step=0, others=[one], config={"seed": 3}) as trackers:
        use(trackers)
    assert one.calls == [
        ("start", 0, 0, {"seed": 3}),
        ("page", 0, "first_batch", "<p>"),
        ("images", 0, "first_batch", [CaptionedImage(b"png", "caption")]),
        ("scalars", 1, {"loss": 0.5}),
        ("scalars", 2, {"loss": 1.0}),
        ("table", 2, "replies", ["a"], [["b"]]),
        ("close", False),
    ]
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize("method", ["start", "page", "images", "scalars", "table", "close"])
def test_a_tracker_that_fails_is_off_in_one_line_and_the_others_go_on(method, tmp_path, caplog):
    bad, good = Recording("bad", fails=method), Recording("good")
    with caplog.at_level(logging.WARNING), Trackers(tmp_path, resume_step=0, others=[bad, good]) as trackers:
        use(trackers)
    (line,) = caplog.messages
    assert line == f"the tracker bad is off from now on, the training goes on: no network while {method}"
    assert [call[0] for call in bad.calls].index(method) == len(bad.calls) - 1
    assert len(good.calls) == 7
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 2


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        Trackers(tmp_path, resume_step=0)


def test_a_continued_run_drops_later_records_and_tells_trackers_which_were_written(tmp_path):
    with Trackers(tmp_path, resume_step=0) as trackers:
        for step in range(1, 7):
            trackers.write(step, {"loss": 1.0})
    one = Recording()
    with Trackers(tmp_path, resume_step=4, others=[one]) as trackers:
        trackers.write(5, {"loss": 2.0})
    assert one.calls[0] == ("start", 4, 6, {})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((step, 1.0) for step in range(1, 5)),
        (5, 2.0),
    ]


def test_an_error_of_the_run_is_told_and_kept(tmp_path):
    one = Recording(fails="close")
    with (
        pytest.raises(KeyError, match="of the run"),
        Trackers(tmp_path, resume_step=0, others=[one]),
    ):
        raise KeyError("of the run")
    assert one.calls[-1] == ("close", True)


def test_a_process_that_does_not_write_opens_nothing(tmp_path):
    one = Recording()
    with Trackers(tmp_path, resume_step=0, others=[one], active=False) as trackers:
        use(trackers)
    assert one.calls == []
    assert not list(tmp_path.iterdir())
