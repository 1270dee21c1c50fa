"""The script that plans for pods writes a table between its marks, and continues where it was stopped."""

import json

import pytest

from benchmarks.speed import pod_plans

PLAN = {
    "mesh": {"replica": 1, "fsdp": 8, "tensor": 1},
    "settings": {"rows": 8, "optimization_level": "default"},
    "memory": {"arguments": 2**31, "temporaries": 2**30, "peak": 3 * 2**30, "capacity": 141 * 2**30, "fits": True},
    "work": {"flops": 35.3e12, "hbm_bytes": 131e9, "collective_bytes": {"all-gather": 1e9, "reduce-scatter": 2e9}},
    "roofline": {"compute": 0.0357, "hbm": 0.0273, "interconnect": 0.01, "mfu": 0.74},
    "schedule": {"days": 0.01},
    "compile_seconds": 61.2,
    "versions": {"jax": "0.12.0"},
}


def test_a_row_has_a_cell_for_each_column():
    case = pod_plans.Case("0_5b:phase2", "h200:1x1x8")
    cells = dict(zip(pod_plans.HEAD, pod_plans.row(case, PLAN), strict=True))
    assert cells["config"] == "0.5b phase2"
    assert cells["replica x fsdp x tensor"] == "1 x 8 x 1"
    assert (cells["state"], cells["peak"], cells["fits"]) == ("2.00", "3.00", "yes")
    assert (cells["sent, GB"], cells["MFU bound"], cells["minutes"]) == ("3.0", "74%", "14.4")


def test_the_table_replaces_only_what_is_between_the_marks(tmp_path):
    done, failed = (pod_plans.Case("0_5b:phase1", topology) for topology in ("h200:1x1x8", "v5e:4x4"))
    (tmp_path / done.name).mkdir()
    (tmp_path / done.name / "plan.json").write_text(json.dumps([PLAN]))
    (tmp_path / f"{failed.name}.error.txt").write_text("no compiler")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pod_plans.BEGIN}\nold\n{pod_plans.END}\nafter\n")
    pod_plans.write([done, failed], tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"before\n{pod_plans.BEGIN}\n\n| config |")
    assert text.endswith(f"{pod_plans.END}\nafter\n")
    assert "old" not in text
    assert "* 0_5b:phase1 on v5e:4x4 : no compiler" in text
    assert json.loads((tmp_path / "page.json").read_text()) == [PLAN]


@pytest.mark.slow
def test_script(plain_children, tmp_path, capsys):
    """It is slow because a plan is a process that compiles the training step of the demo."""
    page, workdir = tmp_path / "page.md", tmp_path / "plans"
    pod_plans.main(["--tiny", f"--workdir={workdir}", f"--page={page}"])
    [plan] = json.loads((tmp_path / "page.json").read_text())
    [row] = [line for line in page.read_text().splitlines() if line.startswith("| demo | cpu:1 | 1 x 1 x 1 |")]
    assert row.count("|") == len(pod_plans.HEAD) + 1
    assert plan["memory"]["arguments"] > 0
    assert "exit 0" in capsys.readouterr().out
    pod_plans.main(["--tiny", f"--workdir={workdir}", f"--page={page}"])
    assert capsys.readouterr().out == "demo_cpu_1 kept\n"
