"""Results are written and read back; files that are no results are refused with the reason."""

import json

import pytest

from tests.probe.made_up import made_up_result
from vr_jax.errors import UserError
from vr_jax.probe.results import read_results, table, write_results


def test_results_are_read_as_they_were_written(tmp_path):
    result = made_up_result("vr", refusion=True)
    write_results(tmp_path, result)
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == result
    assert json.loads((tmp_path / "results.json").read_text())["chance"] == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no such file; expected the results\.json of `vr-jax probe`"),
        ("{", "the file is not JSON"),
        ("[]", "the file does not contain results of `vr-jax probe`"),
        ('{"format": "vr_jax probe", "version": 1}', "have the format version 1, but this program reads version 2"),
        ('{"format": "vr_jax probe", "version": 2}', r"the file is damaged \(KeyError: 'taps'\); run the probe again"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(tmp_path / "results.json")


def test_the_table_shows_every_tap_and_what_is_missing():
    lines = table(made_up_result("vr", refusion=True)).splitlines()
    assert lines[0] == "vr: 4 classes, 8 training and 10 validation images"
    assert lines[6] == "layer 1 + vision_remember          9 x 16   80.0 ± 14.1 %"
    assert lines[9].split() == ["chance", "25.0", "%"]
    assert lines[10] == "left out: x (not there)"
    assert lines[11] == "1 val image(s) could not be read and count as wrong, e.g. a (b)"
