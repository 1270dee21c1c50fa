"""The benchmark of images in a bucket runs, at a tiny size."""

import argparse

from benchmarks.input import buckets


def test_it_reads_from_both_places(bucket, tmp_path, capsys):
    options = argparse.Namespace(images=4, pixels=32, rounds=1, workers=[0])
    buckets.measure(options, bucket, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == ["", "read, threads", "decode, threads"]
