"""What tells data sets apart: the number of records, and names, sizes and times of the files, wherever they lie."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from vr_jax.data.demo.source import DemoSource
from vr_jax.data.fingerprint import change, data_files, fingerprint
from vr_jax.data.sources import open_source

RECORDS = [
    {"id": str(k), "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for k in range(3)
]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data"
    place.mkdir()
    for name in ("a.json", "b.json"):
        (place / name).write_text(json.dumps(RECORDS))
    return place


def of(folder):
    return fingerprint(open_source([folder / "a.json", folder / "b.json"]))


def test_all_files_of_several_sources_are_known(folder):
    source = open_source([folder / "a.json", folder / "b.json"])
    assert data_files(source) == [folder / "a.json", folder / "b.json"]
    assert (of(folder)["records"], of(folder)["number"]) == (6, 2)
    assert json.loads(json.dumps(of(folder))) == of(folder)


def test_a_copy_elsewhere_with_its_times_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")  # copy2 keeps the times
    assert change(of(folder), of(tmp_path / "copy")) is None


def test_size_and_time_tell_a_change(folder):
    before = of(folder)
    state = (folder / "b.json").stat()
    os.utime(folder / "b.json", ns=(state.st_mtime_ns, state.st_mtime_ns + 10**9))
    assert "b.json was changed at" in change(before, of(folder))
    (folder / "b.json").write_text(json.dumps(RECORDS[:2]))
    assert "b.json had" in change(before, of(folder))


def test_generated_records_have_no_files():
    assert fingerprint(DemoSource("train", 5, 0))["number"] == 0
    assert "there were 5 records, now 6" in change(
        fingerprint(DemoSource("train", 5, 0)), fingerprint(DemoSource("train", 6, 0))
    )
