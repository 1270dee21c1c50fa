"""The file of metrics is read line by line, and a line that is none of its own is named."""

from __future__ import annotations

import pytest

from vr_jax.errors import UserError
from vr_jax.training.trackers import read_metrics


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_metrics(path)) == [{"step": 1}]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"{", b"3", b'{"loss": 1.0}', b""])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: .*; move the file away"):
        list(read_metrics(path))
