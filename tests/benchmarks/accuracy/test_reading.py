"""The scripts of the comparison on pages: the parts start every system, and the table is that of the results."""

import json

import pytest

from benchmarks.accuracy import reading, reading_parts
from vr_jax.cli.main import main
from vr_jax.data.demo.pages import KINDS
from vr_jax.demo import SYSTEMS
from vr_jax.demo.commands import Workers, prepare_steps, system_steps
from vr_jax.demo.results import SystemResult
from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate
from vr_jax.model_directory import read_sections
from vr_jax.settings import load_config

PARTS = reading.ROOT / "vr_jax" / "data" / "demo" / "pretrained"


def test_the_stored_parts_start_every_system(tmp_path):
    """They are small, the converter reads them, and the configs of all systems have their sizes."""
    assert sum(path.stat().st_size for path in PARTS.rglob("*") if path.is_file()) <= 3_000_000
    start = tmp_path / "start"
    flags = [f"--encoder={PARTS / 'siglip'}", f"--decoder={PARTS / 'qwen2'}", f"--to={start}"]
    assert main(["convert", "import", *flags]) == 0
    found = read_sections(start)
    for system in SYSTEMS:
        config = load_config(f"configs/reading.py:{system.name}_phase1").model.to_dict()
        assert config["encoder"] == found["encoder"]
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        assert [config["decoder"][name] for name in sizes] == [found["decoder"][name] for name in sizes]
        assert config["decoder"]["rope_theta"] == found["decoder"]["rope_theta"]


def result(system, score):
    scores = {kind: Estimate(score, baseline=10.0) for kind in KINDS}
    return SystemResult(
        system, None, BenchmarkScores("chartqa", "", None, Estimate(score, baseline=10.0), scores, {}), {}, {}
    )


def test_the_table_has_means_seeds_and_gains(tmp_path, monkeypatch):
    """Pooling answers 20 and 30 % with two seeds, every other system 40 points more."""
    folders = []

    def compare(folder, *, seed, steps):
        assert steps == 5
        folder.mkdir(parents=True)
        (folder / reading.REPORT).touch()
        folders.append(folder)

    monkeypatch.setattr(reading, "compare", compare)
    monkeypatch.setattr(
        reading,
        "read_result",
        lambda system, folder: result(system, 20.0 + 10 * int(folder.name) + 40 * ("pooling" not in system.name)),
    )
    page = tmp_path / "page.md"
    page.write_text(f"before {reading.BEGIN} old {reading.END} after")
    flags = ["--seeds", "0", "1", f"--workdir={tmp_path / 'runs'}", f"--page={page}", "--steps=5"]
    assert reading.main(flags) == 0
    assert reading.main(flags) == 0
    assert len(folders) == 2, "what is complete is not run again"
    text = page.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "| 1/9 pooling | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 20.0, 30.0 |" in text
    assert "| 1 | 70.0 | 70.0 | 70.0 | 70.0 | 70.0 | 70.0 |" in text
    assert "Vision Remember against pooling at 1/16: +40.0, +40.0 points." in text
    assert "old" not in text


@pytest.mark.slow  # Four programs of the encoder and the decoder are compiled, and then a training in two phases.
def test_the_parts_are_trained_and_a_system_is_trained_from_those_of_the_repository(tmp_path):
    assert (
        reading_parts.main(["--setting=toy", f"--output={tmp_path / 'parts'}", f"--workdir={tmp_path / 'work'}"]) == 0
    )
    assert main(["convert", "import", f"--encoder={tmp_path / 'parts' / 'siglip'}", f"--to={tmp_path / 'a'}"]) == 0
    assert main(["convert", "import", f"--decoder={tmp_path / 'parts' / 'qwen2'}", f"--to={tmp_path / 'b'}"]) == 0
    assert "parameters" in (tmp_path / "parts" / "README.md").read_text()

    workdir = tmp_path / "run"
    (chain,) = [system_steps(system, workdir, seed=0, steps=1) for system in SYSTEMS if system.name == "pooling_9"]
    with Workers(1, print) as workers:
        workers.run([prepare_steps(workdir, pages=50, held_out=5, seed=0)])
        workers.run([chain])
    summary = json.loads((workdir / "pooling_9" / "eval" / "summary.json").read_text())
    assert summary["benchmarks"]["chartqa"]["items"] == 5
