"""The whole path on real files, with one command: convert nothing, train two phases, evaluate, count.

    python -m benchmarks.accuracy.real_charts [--data ../shared/data] [--items 32] [--workdir runs/real_charts]

Phase 1 learns the captions of real photographs, phase 2 real ChartQA training questions, both through train.py with
the real Qwen2 tokenizer and chained through checkpoints; then eval.py asks those same questions (a model that has
memorised them answers >= 95 %) and the real test subset (whatever it scores: nothing here is pretrained).

DATA holds natural/captions_llava.json with natural/images, chartqa/train.jsonl and test.jsonl (type, question, answer,
image) with chartqa/images, and qwen2_tokenizer/. The result is written to --results as JSON and as a page."""

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

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/real_charts.py"
PROMPT = "<image>\n{question}\nAnswer the question with a single word."  # what eval.py asks
NEEDED = ("natural/captions_llava.json", "chartqa/train.jsonl", "chartqa/test.jsonl", "qwen2_tokenizer/vocab.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--items", type=int, default=32, help="training questions to memorise")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "real_charts", help="emptied first")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "real_charts.md")
    parser.add_argument("--steps", type=int, help="updates of phase 2; default: the config's")
    options = parser.parse_args()
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
        )
        scores[name] = json.loads((output / "chartqa" / "summary.json").read_text())
    losses = {phase: final_loss(workdir / phase / "metrics.jsonl") for phase in ("phase1", "phase2")}
    page = write_page(count, scores, losses, seconds)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(page)
    print(page)
    return 0


def write_items(source: Path, target: Path, count: int) -> int:
    """The first `count` training questions, as LLaVA JSON and in the benchmark's own layout, with their images."""
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
    """Runs one of the entry points as a user would; its failure ends this program."""
    print(f"\n== {name}: python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    seconds[name] = time.perf_counter() - start


def final_loss(path: Path) -> tuple[float, float]:
    """Loss of the first and the last step."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return records[0]["loss"], records[-1]["loss"]


def write_page(
    count: int, scores: dict[str, Any], losses: dict[str, tuple[float, float]], seconds: dict[str, float]
) -> str:
    import jax

    memorised, test = scores["memorised"]["metrics"], scores["test"]["metrics"]
    lines = [
        "# Real charts, end to end",
        "",
        "`python -m benchmarks.accuracy.real_charts`: phase 1 on captions of real photographs, phase 2 on real ChartQA",
        "questions, both from scratch with a model small enough for two CPU cores and the real Qwen2 tokenizer, then",
        "`eval.py` with ChartQA's relaxed accuracy. Memorising the training questions shows that the whole path works",
        "on real files; the test score of a model trained on so few questions says nothing about the method.",
        "",
        "| questions | items | relaxed accuracy |",
        "|---|---|---|",
        f"| training questions it was trained on | {count} | {memorised['relaxed_overall']:.1%} |",
        f"| test subset, all | {scores['test']['items']} | {test['relaxed_overall']:.1%} |",
    ]
    for split, items in scores["test"]["items_by_category"].items():
        lines.append(f"| test subset, {split} | {items} | {test[f'relaxed_{split}_split']:.1%} |")
    lines += ["", "| phase | loss of the first step | of the last |", "|---|---|---|"]
    lines += [f"| {phase} | {first:.3f} | {last:.4f} |" for phase, (first, last) in losses.items()]
    lines += ["", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in {**seconds, "all": sum(seconds.values())}.items()]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    lines += ["", f"Machine: {machine}; Python {platform.python_version()}, jax {jax.__version__}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
