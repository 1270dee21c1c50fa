"""Trains two phases on real files and evaluates the model, with one command.

    python -m benchmarks.accuracy.real_charts [--data DIR] [--items 32] [--workdir runs/real_charts]

Phase 1 learns the captions of real photographs. Phase 2 starts from its model and learns real ChartQA training
questions. Both run train.py with the real Qwen2 tokenizer. Then eval.py asks the same questions, of which a model that
has memorised them answers at least 95 % correctly. It also asks the test questions; their score says nothing, because
nothing here is pretrained.

DIR holds natural/captions_llava.json with natural/images, chartqa/train.jsonl and chartqa/test.jsonl (with the fields
type, question, answer and image) with chartqa/images, and qwen2_tokenizer/. The result is written to the Markdown page
--results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import arguments

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/real_charts.py"
PROMPT = "<image>\n{question}\nAnswer the question with a single word."  # The question as eval.py asks it.
NEEDED = ("natural/captions_llava.json", "chartqa/train.jsonl", "chartqa/test.jsonl", "qwen2_tokenizer/vocab.json")


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=arguments.path, default=ROOT.parent / "shared" / "data")
    flags.add_argument("--items", type=int, default=32, help="training questions to memorise")
    flags.add_argument("--workdir", type=arguments.path, default=ROOT / "runs" / "real_charts", help="emptied first")
    flags.add_argument("--results", type=arguments.path, default=ROOT / "docs" / "results" / "real_charts.md")
    flags.add_argument("--steps", type=int, help="updates of phase 2; default: those of the config")
    flags.add_argument("--caption_steps", type=int, help="updates of phase 1; default: those of the config")
    flags.add_argument("--limit", type=int, help="test questions that are asked; default: all")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Trains, evaluates and writes the page."""
    options = parser().parse_args(arguments)
    missing = [name for name in NEEDED if not (options.data / name).is_file()]
    if missing:
        print(f"real_charts: {options.data} lacks {', '.join(missing)}; give --data", file=sys.stderr)
        return 1
    workdir, data = options.workdir.resolve(), options.data.resolve()
    shutil.rmtree(workdir, ignore_errors=True)
    count = write_items(data / "chartqa", workdir / "chartqa", options.items)

    seconds: dict[str, float] = {}
    tokenizer = f"--config.tokenizer={data / 'qwen2_tokenizer'}"
    run(
        seconds,
        "phase 1",
        "train.py",
        f"--config={CONFIG}:phase1",
        f"--workdir={workdir / 'phase1'}",
        f"--config.data.path={data / 'natural' / 'captions_llava.json'}",
        tokenizer,
        *([f"--config.steps={options.caption_steps}"] if options.caption_steps else []),
    )
    run(
        seconds,
        "phase 2",
        "train.py",
        f"--config={CONFIG}:phase2",
        f"--workdir={workdir / 'phase2'}",
        f"--config.init_from={workdir / 'phase1' / 'model'}",
        f"--config.data.path={workdir / 'chartqa' / 'train.json'}",
        tokenizer,
        *([f"--config.steps={options.steps}"] if options.steps else []),
    )
    scores = {}
    for name, folder, split in (("memorised", workdir / "chartqa", "train"), ("test", data / "chartqa", "test")):
        output = workdir / f"eval_{name}"
        run(
            seconds,
            f"evaluation, {name}",
            "eval.py",
            f"--checkpoint={workdir / 'phase2' / 'model'}",
            "--benchmark=chartqa",
            f"--data={folder}",
            f"--split={split}",
            f"--output={output}",
            *([f"--limit={options.limit}"] if options.limit else []),
        )
        scores[name] = json.loads((output / "chartqa" / "summary.json").read_text())
    losses = {phase: final_loss(workdir / phase / "metrics.jsonl") for phase in ("phase1", "phase2")}
    page = write_page(count, scores, losses, seconds)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(page)
    print(page)
    return 0


def write_items(source: Path, target: Path, count: int) -> int:
    """Copies the first training questions with their images, in LLaVA's format and in that of the benchmark.

    Args:
        source: The folder chartqa of the data.
        target: The new folder.
        count: The number of questions.

    Returns:
        The number of questions that there are.
    """
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()][:count]
    records = []
    (target / "images").mkdir(parents=True)
    for number, row in enumerate(rows):
        shutil.copy(source / row["image"], target / row["image"])
        turns = [("human", PROMPT.format(question=row["question"])), ("gpt", row["answer"])]
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": f"chartqa-train-{number}", "image": row["image"], "conversations": conversation})
    (target / "train.json").write_text(json.dumps(records, indent=1))
    (target / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def run(seconds: dict[str, float], name: str, *command: str) -> None:
    """Runs an entry point as a user would, and notes its seconds under `name`. Its failure ends this program."""
    print(f"\n== {name}: python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    seconds[name] = time.perf_counter() - start


def final_loss(path: Path) -> tuple[float, float]:
    """The losses of the first and the last step in a file of metrics."""
    losses = [record["loss"] for record in map(json.loads, path.read_text().splitlines()) if "loss" in record]
    return losses[0], losses[-1]


def write_page(
    count: int, scores: dict[str, Any], losses: dict[str, tuple[float, float]], seconds: dict[str, float]
) -> str:
    """The result page as Markdown.

    Args:
        count: Training questions.
        scores: The evaluations' summaries, "memorised" and "test" (`summary.json` of a benchmark).
        losses: Losses of the first and the last step of each phase.
        seconds: Seconds of each part.
    """
    import jax

    memorised, test = scores["memorised"]["metrics"], scores["test"]["metrics"]
    lines = [
        "# Real charts, end to end",
        "",
        "`python -m benchmarks.accuracy.real_charts` trains phase 1 on captions of real photographs and phase 2 on",
        "real ChartQA training questions. Both start from scratch, with a model small enough for two CPU cores and the",
        "real Qwen2 tokenizer. Then `vr-jax eval` measures ChartQA's relaxed accuracy. That the training questions are",
        "memorised shows that the whole path works on real files; the test score of a model trained on so few",
        "questions says nothing about the method.",
        "",
        "| questions | items | relaxed accuracy |",
        "|---|---|---|",
        f"| training questions it was trained on | {count} | {memorised['relaxed_overall']:.1%} |",
        f"| test subset, all | {scores['test']['items']} | {test['relaxed_overall']:.1%} |",
    ]
    for category, one in scores["test"]["categories"].items():
        lines.append(f"| test subset, {category} | {one['items']} | {test[f'relaxed_{category}_split']:.1%} |")
    lines += ["", "| phase | loss of the first step | of the last |", "|---|---|---|"]
    lines += [f"| {phase} | {first:.3f} | {last:.4f} |" for phase, (first, last) in losses.items()]
    lines += ["", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in {**seconds, "all": sum(seconds.values())}.items()]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    lines += ["", f"Machine: {machine}; Python {platform.python_version()}, jax {jax.__version__}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
