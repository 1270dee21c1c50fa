"""`vr-jax eval` on a model directory and files of ChartQA: interruptions, config files, and messages for mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import run
from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from vr_jax.cli.eval import EvalFlags, Interrupt, settings_of
from vr_jax.evaluation import evaluate, load_results
from vr_jax.settings import EvaluationSettings, TrainConfig

COUNT = 24
MANY = 150  # so many that the process cannot end before it is killed


def write_chartqa(folder, count):
    """Writes ChartQA's layout, of which one image is missing."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        kind = "human_test" if i % 2 else "augmented_test"
        image = f"images/{i}.png"
        if i != 7:
            (folder / image).write_bytes(tiny.png(30, 15, i))
        lines.append({"type": kind, "question": f"What is number {i}?", "answer": str(i), "image": image})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and data."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.save(folder / "model", vision_remember=False)
    write_chartqa(folder / "chartqa", COUNT)
    return folder


def results(directory):
    return sorted(load_results(directory), key=lambda result: result.id)


@pytest.fixture(scope="module")
def whole(folder):
    return evaluate(
        EvaluationSettings(
            checkpoint=str(folder / "model"), benchmark="chartqa", data=str(folder / "chartqa"), batch_size=4
        )
    )


@pytest.mark.slow  # Three processes. test_runner.py interrupts and continues within one process.
def test_killed_and_continued_equals_uninterrupted(folder, tmp_path):
    """The real program, killed with SIGKILL while it writes, then the same command again."""
    data, uninterrupted = tmp_path / "data", tmp_path / "uninterrupted"
    write_chartqa(data, MANY)
    settings = {"checkpoint": str(folder / "model"), "benchmark": "chartqa", "data": str(data), "batch_size": 4}
    whole = evaluate(EvaluationSettings(**settings, output=str(uninterrupted)))
    command = [
        *(sys.executable, "eval.py", f"--checkpoint={folder / 'model'}", "--benchmark=chartqa"),
        *(f"--data={data}", f"--output={tmp_path}", "--batch_size=1"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    lines = tmp_path / "chartqa" / "items.jsonl"
    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert first.poll() is None, "eval.py ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = lines.read_bytes().count(b"\n")
    assert 2 <= done < MANY
    assert not (tmp_path / "chartqa" / "summary.json").exists()

    second = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert re.search(rf"ChartQA +{MANY} +{whole.summaries['chartqa']['score']:.2f} +\[", second.stdout)
    assert "1 items could not be scored and count as wrong: {'missing_image': 1}" in second.stdout
    assert f"{MANY}/{MANY}" in second.stderr, "no progress bar"
    assert results(tmp_path / "chartqa") == results(uninterrupted / "chartqa")
    summary = json.loads((tmp_path / "chartqa" / "summary.json").read_text())
    assert summary["metrics"] == whole.summaries["chartqa"]["metrics"]
    assert summary["throughput"]["items_of_an_earlier_session"] >= done - 1


def test_results_lie_below_the_checkpoint_unless_told(folder, whole):
    assert len(load_results(folder / "model" / "eval" / "chartqa")) == COUNT
    assert set(whole.summaries["chartqa"]["metrics"]) == {
        "relaxed_overall",
        "relaxed_human_split",
        "relaxed_augmented_split",
    }
    assert whole.summaries["chartqa"]["unscored"]["items"].keys() == {"test-00007"}
    assert json.loads((folder / "model" / "eval" / "summary.json").read_text()) == whole.summary
    assert whole.summary["benchmarks"]["chartqa"]["score"] == whole.summaries["chartqa"]["score"]
    assert whole.summary["average"] is None


@pytest.mark.slow  # It compiles for a mesh.
def test_a_limit_and_a_config(folder, whole, tmp_path, caplog):
    config = TrainConfig.from_config_dict(
        {
            "model": tiny.config(vision_remember=False).to_dict() | {"remat": "full"},
            "mesh": {"replica": 2, "fsdp": 2, "tensor": 2},
            "eval": {"limit": 3, "batch_size": 4, "output": str(tmp_path)},
            "optimizer": {"lr": 1.0},
        }
    )
    changes = {"checkpoint": str(folder / "model"), "benchmark": "chartqa", "data": str(folder / "chartqa"), "limit": 5}
    settings = dataclasses.replace(config.eval, **changes)
    found = evaluate(settings, model=config.model, mesh=config.mesh)
    assert not caplog.records
    assert results(tmp_path / "chartqa") == results(folder / "model" / "eval" / "chartqa")[:5]
    assert found.summaries["chartqa"]["items"] == 5


@pytest.fixture(scope="module")
def both(folder):
    """ChartQA under its repository's name, DocVQA under ours; one of the DocVQA images does not decode."""
    both = folder / "both"
    for name, split in (("ChartQA", "test"), ("docvqa", "validation")):
        (both / name).mkdir(parents=True)
        for i in range(3):
            (both / name / f"{i}.png").write_bytes(tiny.png(30, 15, i) if (name, i) != ("docvqa", 1) else b"PNG?")
        rows = [
            {"questionId": str(i), "question": f"What is {i}?", "question_types": ["form"], "image": f"{i}.png"}
            | ({"answers": ["x", str(i)]} if name == "docvqa" else {"type": "human_test", "answer": str(i)})
            for i in range(3)
        ]
        (both / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return both


@pytest.mark.slow  # Two benchmarks are evaluated with maps of every reply; tests/evaluation has the parts.
def test_several_benchmarks_make_one_summary_and_one_report(both, tmp_path_factory, tmp_path, capsys):
    checkpoint = tiny.save(tmp_path_factory.mktemp("remember") / "model")
    flags = {"checkpoint": str(checkpoint), "data": str(both), "batch_size": 3, "max_new_tokens": 4}
    flags |= {"output": str(tmp_path), "report_items": 4}
    assert run("eval", **flags, benchmark="docvqa") == 0
    (both / "AI2D").mkdir()
    assert run("eval", **flags, benchmark="gqa, ai2d, chartqa") == 1, "ai2d has no files, gqa no folder"
    out, err = capsys.readouterr()
    assert "vr-jax eval: gqa was not run: " in err
    assert "vr-jax eval: ai2d was not run: " in err
    assert "found neither test.jsonl" in err
    assert "no folder for gqa" in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["chartqa", "docvqa"], "that of the first command is still there"
    assert summary["benchmarks"]["docvqa"]["unscored"]["by_reason"] == {"broken_image": 1}
    assert "DocVQA-val: 1 items could not be scored and count as wrong" in out
    assert len(summary["missing"]) == 9
    for name in ("chartqa", "docvqa"):
        one = json.loads((tmp_path / name / "summary.json").read_text())
        assert (one["items"], one["benchmark"]) == (3, name)
        assert one["score"] == summary["benchmarks"][name]["score"]
    page = (tmp_path / "report.html").read_text()
    assert f"report: {tmp_path / 'report.html'}" in out
    assert page.count("<article") == 3, "the shares of the others are left to chartqa"
    assert "after layer 1" in page
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_lost_interrupt_is_seen_after_the_next_batch(folder, tmp_path, capsys, monkeypatch):
    """As where Python drops the exception that the signal's handler raises inside a callback of JAX."""
    monkeypatch.setattr(Interrupt, "note", lambda self, *_: setattr(self, "seen", True))

    def interrupting(self, results):
        os.kill(os.getpid(), signal.SIGINT)
        check(self, results)

    check = Interrupt.check
    monkeypatch.setattr(Interrupt, "check", interrupting)
    flags = {"checkpoint": str(folder / "model"), "benchmark": "chartqa", "data": str(folder / "chartqa")}
    before = signal.getsignal(signal.SIGINT)
    assert run("eval", **flags, output=tmp_path, batch_size=4, limit=12) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(load_results(tmp_path / "chartqa")) == 8, "one batch, of a row on each device"
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"benchmark": "chart"}, "unknown benchmark 'chart'; did you mean chartqa? known: ai2d, chartqa, demo"),
        ({"benchmark": "gqa,docvqa"}, "no benchmark could be run:"),
        ({"output": "/dev/null"}, "/dev/null is not a folder; choose another one"),
        ({"benchmark": "chartqa,chartqa"}, "expected different names"),
        ({"report_items": -1}, "--report_items=-1: expected an integer >= 0"),
        ({"benchmark": None}, "missing: --benchmark"),
        ({"checkpoint": None}, "missing: --checkpoint"),
        ({"checkpoint": "/nowhere"}, "/nowhere is not a model directory"),
        ({"data": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"benchmark": "demo"}, "chartqa: the benchmark demo reads no files; leave it out"),
        ({"split": "val"}, "found neither val.jsonl nor val-*.parquet"),
        ({"batch_size": 0}, "--batch_size=0: expected an integer >= 1"),
        ({"max_new_tokens": 3}, "max_new_tokens: 16 there, 3 now"),
        ({"limit": 3}, "items.count: 24 there, 3 now"),
    ],
)
def test_mistakes_are_explained(folder, whole, capsys, flags, message):
    given = {"checkpoint": str(folder / "model"), "benchmark": "chartqa", "data": str(folder / "chartqa")}
    assert run("eval", **given | flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vr-jax eval: ")
    assert message in err
    assert "Traceback" not in err


def test_flags_win_over_the_config():
    config = TrainConfig(model=tiny.config(), eval=EvaluationSettings(pruning={"name": "fastv"}, limit=3))
    chosen = settings_of(EvalFlags(checkpoint="a", limit=5), config)
    assert (chosen.checkpoint, chosen.limit, chosen.pruning) == ("a", 5, {"name": "fastv"})
    assert settings_of(EvalFlags(pruning="vispruner"), config).pruning == "vispruner"
    assert settings_of(EvalFlags(benchmark="demo"), None) == EvaluationSettings(benchmark="demo")
