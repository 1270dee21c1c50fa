"""The kernel benchmark runs every backend that the device can, and names kernels whose results are wrong."""

import json

import pytest

from benchmarks.kernels import window_attention as benchmark


@pytest.mark.slow
def test_script(tmp_path, capsys):
    """It is slow because Pallas interprets the kernels on a CPU."""
    file = tmp_path / "kernels.json"
    assert benchmark.main(["--tiny", "--rounds=1", f"--json={file}"]) == 0
    report = json.loads(file.read_text())
    cases = report["window_attention"]
    forms = [(form, part) for form in ("absorbed", "plain") for part in ("forward", "gradient")]
    assert [(case["form"], case["part"]) for case in cases] == forms
    for case in cases:
        assert set(case["backends"]) == {"reference", "pallas_tpu", "pallas_gpu"}
        assert case["backends"]["pallas_tpu"]["agrees"]
        # The arrays are in bfloat16, whose numbers are 2 ** -8 apart, relative to their size.
        assert case["backends"]["reference"]["error"] < 2**-6
    assert "interpreted: no times" in capsys.readouterr().out


def test_the_full_size_needs_an_accelerator():
    with pytest.raises(SystemExit, match="use --tiny or --compile"):
        benchmark.main([])


def test_wrong_kernels_are_named():
    backends = {
        "reference": {"agrees": True},
        "one": {"agrees": False},
        "two": {"failed": "E: no"},
        "three": {"refused": "x"},
    }
    report = {"window_attention": [{"form": "plain", "part": "forward", "backends": backends}]}
    assert benchmark.wrong(report) == [
        "plain, forward: one DIFFERS from the reference",
        "plain, forward: two E: no",
    ]


def test_the_floor_counts_each_array_once():
    """The forward pass reads query and keys and writes the result; the gradient reads one more array of rows."""
    absorbed, plain = benchmark.problems(tiny=True, heads_first=False)
    rows, keys = 19 * 2 * 256, 19 * 9 * 256
    assert absorbed.floor == {"forward": 2 * (2 * rows + keys), "gradient": 2 * (3 * rows + keys)}
    rows, keys = 19 * 2 * 128, 2 * 19 * 9 * 2 * 128
    assert plain.floor == {"forward": 2 * (2 * rows + keys), "gradient": 2 * (3 * rows + 2 * keys)}
