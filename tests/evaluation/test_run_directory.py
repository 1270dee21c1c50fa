"""Nothing is lost, nothing is mixed: torn lines, other settings, two writers."""

from __future__ import annotations

import json

import pytest

from vr_jax.errors import UserError
from vr_jax.evaluation.interface import ItemResult
from vr_jax.evaluation.run_directory import RunDirectory, load_results

SETTINGS = {"benchmark": "chartqa", "checkpoint": {"path": "/a", "sha256": "1"}, "limits": [1, 2]}


def result(name: str, **changes) -> ItemResult:
    values = {"category": "human", "question": "Whät\ud800?\n", "answers": ("1", "2"), "prediction": "é", "score": 1.0}
    return ItemResult(name, **values | {"finish": "stop"} | changes)


def test_results_survive_exactly(tmp_path):
    with RunDirectory(tmp_path / "a" / "b", SETTINGS) as run:
        run.append([result("1"), result("2", prediction=None, finish=None, error="broken_image: x", score=0.0)])
        run.append([result("3", prediction="")])
        written = dict(run.results)
    with RunDirectory(tmp_path / "a" / "b", SETTINGS) as run:
        assert run.results == written
        assert list(run.results) == ["1", "2", "3"]
    assert load_results(tmp_path / "a" / "b") == list(written.values())


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path, cut):
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append([result("1"), result("2")])
    file = tmp_path / "items.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with RunDirectory(tmp_path, SETTINGS) as run:
        assert set(run.results) == {"1"}
        run.append([result("2")])
    assert file.read_bytes() == whole


def test_an_item_answered_again_counts_once(tmp_path):
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append([result("1", prediction=None, error="missing_image: x", score=0.0), result("2")])
        run.append([result("1", score=0.5), result("2")])
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 3
    assert [r.score for r in load_results(tmp_path)] == [0.5, 1.0]


def test_other_settings_are_refused_by_name(tmp_path):
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append([result("1")])
    before = (tmp_path / "items.jsonl").read_bytes()
    other = {"benchmark": "chartqa", "checkpoint": {"path": "/b", "sha256": "2"}, "limits": [1, 3], "new": True}
    with pytest.raises(UserError) as error:
        RunDirectory(tmp_path, other)
    assert "\n" not in str(error.value)
    assert (
        "holds a run with other settings (checkpoint: the content differs; limits: [1, 2] there, [1, 3] now; "
        "new: None there, True now); choose another --output"
    ) in str(error.value)
    assert (tmp_path / "items.jsonl").read_bytes() == before
    with RunDirectory(tmp_path, SETTINGS | {"checkpoint": {"path": "/moved", "sha256": "1"}}) as run:
        assert set(run.results) == {"1"}
    with RunDirectory(tmp_path, other, overwrite=True) as run:
        assert run.results == {}
    with RunDirectory(tmp_path, other) as run:
        assert run.results == {}


def test_a_run_that_answered_nothing_leaves_the_folder_free(tmp_path):
    unasked = result("1", prediction=None, finish=None, error="missing_image: x", score=0.0)
    other = SETTINGS | {"limits": [1, 3]}
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append([unasked])
    with RunDirectory(tmp_path, other) as run:
        assert run.results == {}
        run.append([unasked, result("2")])
    with pytest.raises(UserError, match="holds a run with other settings"):
        RunDirectory(tmp_path, SETTINGS)
    with RunDirectory(tmp_path, other) as run:
        assert set(run.results) == {"1", "2"}


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', "null", '{"answers": 3}'])
def test_a_damaged_line_is_named(tmp_path, line):
    with RunDirectory(tmp_path, SETTINGS) as run:
        run.append([result("1")])
    file = tmp_path / "items.jsonl"
    file.write_text(file.read_text() + line + "\n" + json.dumps(result("2").to_dict()) + "\n")
    with pytest.raises(UserError, match=r"items\.jsonl, line 2 is damaged"):
        RunDirectory(tmp_path, SETTINGS)
    assert "2" in file.read_text(), "nothing may be thrown away"


def test_items_without_settings_are_refused(tmp_path):
    (tmp_path / "items.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"but no settings\.json"):
        RunDirectory(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        RunDirectory(tmp_path, SETTINGS)


def test_two_writers_are_refused(tmp_path):
    with RunDirectory(tmp_path, SETTINGS) as run:
        with pytest.raises(UserError, match="is in use by another run"):
            RunDirectory(tmp_path, SETTINGS, overwrite=True)
        run.append([result("1")])
    with RunDirectory(tmp_path, SETTINGS) as run:
        assert set(run.results) == {"1"}


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="is not the result folder of a benchmark"):
        load_results(tmp_path)
