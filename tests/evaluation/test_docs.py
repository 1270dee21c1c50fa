"""The commands of docs/evaluate.md and docs/lmms_eval.md exist, and those for the demo's model run at a small size."""

import base64
import json
import shlex

import pytest

from tests.docs import blocks, commands
from tests.golden.discovery import REPOSITORY
from tests.inference import tiny
from vr_jax.cli.chat import ChatFlags
from vr_jax.cli.eval import EvalFlags
from vr_jax.cli.flags import parse
from vr_jax.cli.generate import GenerateFlags
from vr_jax.cli.main import main
from vr_jax.cli.train import TrainFlags
from vr_jax.data.demo.reading import write_reading
from vr_jax.evaluation.benchmarks import BENCHMARKS, get_benchmark
from vr_jax.evaluation.lmms_eval.options import Options

FLAGS = {"chat": ChatFlags, "eval": EvalFlags, "generate": GenerateFlags, "train": TrainFlags}


@pytest.mark.parametrize("words", commands("evaluate.md"), ids=" ".join)
def test_every_flag_exists(words):
    parse(FLAGS[words[0]], words[1:])


def test_the_options_of_the_lmms_eval_command_exist():
    (line,) = [
        line for block in blocks("lmms_eval.md", "console") for line in block.splitlines() if "-m lmms_eval" in line
    ]
    words = shlex.split(line)
    pairs = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
    assert Options.of(pairs | {"batch_size": "16"}).batch_size == 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the demo's held-out pages and a tiny model in the place of the demo's."""
    monkeypatch.chdir(tmp_path)
    write_reading(tmp_path / "runs" / "demo" / "data", pages=1, held_out=3, turns=1)
    tiny.save(tmp_path / "runs" / "demo" / "model")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    return tmp_path


@pytest.mark.slow
def test_the_commands_for_the_demo_run(folder, capsys):
    small = {"chat": ["--max_new_tokens=2"], "eval": ["--limit=2", "--max_new_tokens=2", "--report_items=1"]}
    (code,) = [block for block in blocks("evaluate.md", "python") if 'mine.jsonl").write_text' in block]
    exec(code, {})
    run = 0
    for words in commands("evaluate.md"):
        if "--checkpoint=runs/demo/model" in words and "--image=a.png" not in words and words[0] in small:
            if any(word.startswith("--config=") for word in words):
                continue  # The config describes the demo's model, and this one is smaller.
            assert main([words[0], *small[words[0]], *words[1:]]) == 0, words
            run += 1
    assert run == 3
    assert (folder / "runs" / "demo" / "eval_mine" / "mine" / "summary.json").is_file()
    assert (folder / "runs" / "demo" / "eval" / "report.html").is_file()


def test_the_benchmark_of_the_page_is_complete(tmp_path, monkeypatch):
    """The command finds it by its name, reads its rows and scores replies."""
    (code,) = [block for block in blocks("evaluate.md", "python") if "PublishedBenchmark" in block]
    names = {"__name__": "yesno"}
    exec(code, names)
    monkeypatch.setitem(BENCHMARKS, "yesno", names["YesNo"])
    row = {"question": "Is it red?", "answer": "Yes", "image": base64.b64encode(tiny.png(8, 8)).decode()}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    benchmark = get_benchmark("yesno")
    (item,) = benchmark.items(tmp_path)
    assert (item.problem, benchmark.prompt(item)) == (None, "Is it red?\nAnswer yes or no.")
    assert [benchmark.score(reply, item) for reply in ("yes", " Yes ", "no")] == [1, 1, 0]


@pytest.mark.slow
def test_the_python_blocks_run(folder, capsys):
    examples = [block for block in blocks("evaluate.md", "python") if "PublishedBenchmark" not in block]
    assert examples
    for example in examples:
        exec(example.replace("limit=8", "limit=2"), {})
    assert len(capsys.readouterr().out.splitlines()) >= len(examples)
