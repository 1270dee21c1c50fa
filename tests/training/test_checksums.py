"""The records of checksums hold the files of their process, whatever the other processes write at the same time."""

import json

from vr_jax.training import checksums


def test_what_other_processes_write_at_this_moment_is_none_of_the_own_files(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "mine").write_text("x")
    (tmp_path / ".checksums.process_3-d7c05457.json").write_text("a record of process 3 before it has its name")
    (tmp_path / "checksums.process_2.json").write_text("{}")
    checksums.write_record(tmp_path)
    record = json.loads(checksums.record_file(tmp_path, 0).read_text())
    assert list(record) == ["state/mine"]
    assert checksums.find_damage([checksums.record_file(tmp_path, 0)]) is None
