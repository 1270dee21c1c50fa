"""Only what a run wrote is replaced, and it continues only on the data that it began with. Nothing is trained here."""

from __future__ import annotations

import json
import re

import pytest

from tests.training.tiny import tiny_run
from vr_jax.data.skips import SkipStatistics
from vr_jax.errors import UserError
from vr_jax.storage import complete_directory, owner_of, write_json
from vr_jax.training.checkpoint import Restored
from vr_jax.training.loop import _resume
from vr_jax.training.run_record import RUN_FILE, WRITTEN, check_data, claim, flat_settings


def model(folder, owner=""):
    with complete_directory(folder, owner=owner) as inside:
        (inside / "config.json").write_text("{}")
    return folder


def record(workdir, **entry):
    write_json(workdir / RUN_FILE, [{"run": "mine"} | entry])


def test_a_new_run_gets_an_identity_and_a_continued_one_keeps_it(tmp_path):
    new = claim(tmp_path / "absent", ())
    assert re.fullmatch("[0-9a-f]{16}", new)
    assert claim(tmp_path / "absent", ()) != new
    record(tmp_path)
    model(tmp_path / "model", "mine")
    (tmp_path / "metrics.jsonl").touch()
    assert claim(tmp_path, ()) == "mine"
    assert owner_of(tmp_path / "model") == "mine"


@pytest.mark.parametrize("name", WRITTEN)
def test_what_no_run_has_written_is_not_continued(tmp_path, name):
    """Folders that an earlier start left empty, because it failed before it wrote anything, do not count."""
    (tmp_path / name).mkdir()
    claim(tmp_path, ())
    (tmp_path / name / "precious").touch()
    with pytest.raises(UserError, match=rf"{tmp_path} holds {name} but no run\.json, so no run has written it"):
        claim(tmp_path, ())
    assert (tmp_path / name / "precious").exists()


@pytest.mark.parametrize("owner", ["", "another"])
def test_a_model_that_somebody_else_wrote_is_not_replaced(tmp_path, owner):
    record(tmp_path)
    model(tmp_path / "model", owner)
    with pytest.raises(UserError, match="model was not written by this run, so it is not replaced; move it away"):
        claim(tmp_path, ())
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("place", ["model", "link", "model/inner"])
def test_a_run_does_not_replace_what_it_starts_from(tmp_path, place):
    record(tmp_path)
    model(tmp_path / "model", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UserError, match=r"the exported model = .* would replace what config\.init_from = .* reads"):
        claim(tmp_path, [tmp_path / place])


DATA = {"records": 4, "number": 1, "sha256": "a", "files": [["a.json", 10, 1_000_000_000]]}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"records": 5}, "there were 4 records, now 5"),
        ({"sha256": "b", "number": 2}, "there were 1 files, now 2"),
        ({"sha256": "b", "files": [["a.json", 11, 1_000_000_000]]}, "a.json had 10 bytes, now 11"),
        ({"sha256": "b", "files": [["b.json", 10, 1_000_000_000]]}, "there was a file a.json, now b.json"),
        (
            {"sha256": "b", "files": [["a.json", 10, 61_000_000_000]]},
            "a.json was changed at 1970-01-01 00:01:01 UTC, before at 1970-01-01 00:00:01 UTC",
        ),
    ],
)
def test_data_that_changed_are_refused_unless_allowed_by_name(tmp_path, now, message):
    record(tmp_path, data=DATA)
    check_data(tmp_path, tiny_run(), DATA, 3)
    check_data(tmp_path, tiny_run(**{"data.allow_changed": True}), DATA | now, 3)
    with pytest.raises(UserError) as error:
        check_data(tmp_path, tiny_run(), DATA | now, 3)
    assert message in str(error.value)
    assert "config.data.allow_changed=True" in str(error.value)


class Position:
    """Stands for the iterator of the data."""

    def __init__(self, samples: int):
        self.state = {"identity": {"samples": samples}, "next": 0}

    def get_state(self):
        return self.state

    def set_state(self, states):
        (state,) = states
        if state["identity"] != self.state["identity"]:
            raise UserError("of other settings")
        self.state = state


def test_another_number_of_records_is_read_from_the_beginning_where_that_is_allowed(caplog):
    saved = {"identity": {"samples": 4}, "next": 3}
    allowed = tiny_run(**{"data.allow_changed": True})

    def resume(config, iterator):
        statistics = SkipStatistics(max_fraction=1.0)
        restored = Restored(
            step=2, state=None, data=[saved], config=config.to_dict(), skip_statistics=statistics.get_state()
        )
        _resume(restored, config, iterator, statistics)
        return iterator.get_state()["next"]

    assert resume(allowed, Position(4)) == 3
    assert resume(allowed, Position(5)) == 0
    assert "there were 4 records, now 5: they are read from their beginning" in caplog.text
    with pytest.raises(UserError, match="cannot continue from step 2: of other settings"):
        resume(tiny_run(), Position(5))


def test_the_newest_start_counts(tmp_path):
    write_json(tmp_path / RUN_FILE, [{"run": "mine", "data": DATA}, {"run": "mine", "data": DATA | {"records": 5}}])
    check_data(tmp_path, tiny_run(), DATA | {"records": 5}, 3)
    assert json.loads((tmp_path / RUN_FILE).read_text())[0]["data"] == DATA


@pytest.mark.parametrize("content", ["{}", "[1]", "[null]", '[{"run": "a"}, []]'])
def test_a_record_of_another_form_is_refused(tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(UserError, match="is no list of objects"):
        claim(tmp_path, ())


def test_settings_by_name_tell_which_entry_of_a_list_changed():
    """A list of sources is not repeated as a whole where one weight of it changes."""
    sources = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]
    assert flat_settings({"data": {"sources": sources}, "trainable": ["*"], "lora": {}}) == {
        "data.sources[0].path": "a",
        "data.sources[0].weight": 1.0,
        "data.sources[1].path": "b",
        "data.sources[1].weight": 1.0,
        "trainable": ["*"],
        "lora": {},
    }
