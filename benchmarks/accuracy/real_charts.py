"""Trains a model of a family on real files and evaluates it, with one command.

    python -m benchmarks.accuracy.real_charts [--family llava|lora|qwen2_5_vl|minicpm_v] [--data DIR] [--items 32]

Phase 1 of the LLaVA learns the captions of real photographs. Phase 2 starts from its model and learns real ChartQA
training questions, with all parameters of the decoder or, as the family "lora", with adapters of its linear layers,
which peft then merges too. The small Qwen2.5-VL and the small MiniCPM-V learn these questions in one run. All run
train.py with the real Qwen2 tokenizer. Then eval.py asks the same questions, of which a model that has memorised them
answers at least 95 % correctly. It also asks the test questions; their score says nothing, because nothing here is
pretrained.

DIR holds natural/captions_llava.json with natural/images, chartqa/train.jsonl and chartqa/test.jsonl (with the fields
type, question, answer and image) with chartqa/images, and qwen2_tokenizer/. The result is the family's section of the
Markdown page --results; the sections of the other families stay.
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
from benchmarks.accuracy.peft_parity import largest_difference

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/real_charts.py"
PROMPT = "<image>\n{question}\nAnswer the question with a single word."  # The question as eval.py asks it.
# The title of each family's section, and its runs: the name, and the variant of the config.
FAMILIES = {
    "llava": ("LLaVA with SigLIP and Qwen2", (("phase 1", "phase1"), ("phase 2", "phase2"))),
    "lora": ("LLaVA with SigLIP and Qwen2, phase 2 by LoRA", (("phase 1", "phase1"), ("phase 2", "phase2"))),
    "qwen2_5_vl": ("Qwen2.5-VL", (("training", "qwen2_5_vl"),)),
    "minicpm_v": ("MiniCPM-V", (("training", "minicpm_v"),)),
}
# What the runs of a family change in the config. Nothing is pretrained here, so that the embeddings, norms and biases
# of the decoder are trained in full as before, while an adapter stands for the change of each of its kernels. A product
# of two matrices follows the gradient more slowly than the kernel itself does, hence more updates.
CHANGES = {("lora", "phase2"): ("--config.lora.rank=64", "--config.lora.alpha=128", "--config.steps=400")}
CAPTIONS = "phase1"
# The special tokens of the chat formats that Qwen2's tokenizer lacks.
TOKENS = ("<|vision_start|>", "<|vision_end|>", "</s>", "<image>", "</image>", "<slice>", "</slice>")
NEEDED = ("natural/captions_llava.json", "chartqa/train.jsonl", "chartqa/test.jsonl", "qwen2_tokenizer/vocab.json")

HEAD = """# Real charts, end to end

`python -m benchmarks.accuracy.real_charts --family=FAMILY` trains a model of a family with Vision Remember on real
ChartQA training questions, the LLaVA after a first phase on captions of real photographs. All start from scratch, with
models small enough for two CPU cores and the real Qwen2 tokenizer. Then `vr-jax eval` measures ChartQA's relaxed
accuracy. That the training questions are memorised shows that the whole path works on real files; the test score of a
model trained on so few questions says nothing about the method.
"""


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--family", choices=FAMILIES, default="llava", help="the family of the model")
    flags.add_argument("--data", type=arguments.path, default=ROOT.parent / "shared" / "data")
    flags.add_argument("--items", type=int, default=32, help="training questions to memorise")
    flags.add_argument("--workdir", type=arguments.path, default=ROOT / "runs" / "real_charts", help="emptied first")
    flags.add_argument("--results", type=arguments.path, default=ROOT / "docs" / "results" / "real_charts.md")
    flags.add_argument("--steps", type=int, help="updates on the questions; default: those of the config")
    flags.add_argument("--caption_steps", type=int, help="updates on the captions; default: those of the config")
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
    title, runs = FAMILIES[options.family]
    tokenizer = write_tokenizer(data / "qwen2_tokenizer", workdir / "tokenizer")

    seconds: dict[str, float] = {}
    start: list[str] = []
    for name, variant in runs:
        captions = variant == CAPTIONS
        steps = options.caption_steps if captions else options.steps
        path = data / "natural" / "captions_llava.json" if captions else workdir / "chartqa" / "train.json"
        run(
            seconds,
            name,
            "train.py",
            f"--config={CONFIG}:{variant}",
            f"--workdir={workdir / variant}",
            f"--config.data.path={path}",
            f"--config.tokenizer={tokenizer}",
            *start,
            *CHANGES.get((options.family, variant), ()),
            *([f"--config.steps={steps}"] if steps else []),
        )
        start = [f"--config.init_from={workdir / variant / 'model'}"]
    last = runs[-1][1]
    scores = {}
    for name, folder, split in (("memorised", workdir / "chartqa", "train"), ("test", data / "chartqa", "test")):
        output = workdir / f"eval_{name}"
        run(
            seconds,
            f"evaluation, {name}",
            "eval.py",
            f"--checkpoint={workdir / last / 'model'}",
            "--benchmark=chartqa",
            f"--data={folder}",
            f"--split={split}",
            f"--output={output}",
            *([f"--limit={options.limit}"] if options.limit else []),
        )
        scores[name] = json.loads((output / "chartqa" / "summary.json").read_text())
    losses = {name: final_loss(workdir / variant / "metrics.jsonl") for name, variant in runs}
    section = write_section(count, scores, losses, seconds)
    if options.family == "lora":
        section += compared_with_peft(workdir / CAPTIONS / "model", workdir / last)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    page = options.results.read_text() if options.results.exists() else ""
    options.results.write_text(with_section(page, title, section))
    print(section)
    return 0


def write_tokenizer(source: Path, target: Path) -> Path:
    """Writes the tokenizer with the tokens of all chat formats behind its own, and returns its folder."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    # The vocabulary has "</s>" as an ordinary token, which no text becomes before it is special.
    added = [AddedToken(name, special=True, normalized=False) for name in TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.save_pretrained(target)
    return target


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


def write_section(
    count: int, scores: dict[str, Any], losses: dict[str, tuple[float, float]], seconds: dict[str, float]
) -> str:
    """The results of a family as Markdown.

    Args:
        count: Training questions.
        scores: The evaluations' summaries, "memorised" and "test" (`summary.json` of a benchmark).
        losses: Losses of the first and the last step of each run.
        seconds: Seconds of each part.
    """
    import jax

    memorised, test = scores["memorised"]["metrics"], scores["test"]["metrics"]
    lines = [
        "| questions | items | relaxed accuracy |",
        "|---|---|---|",
        f"| training questions it was trained on | {count} | {memorised['relaxed_overall']:.1%} |",
        f"| test subset, all | {scores['test']['items']} | {test['relaxed_overall']:.1%} |",
    ]
    for category, one in scores["test"]["categories"].items():
        lines.append(f"| test subset, {category} | {one['items']} | {test[f'relaxed_{category}_split']:.1%} |")
    lines += ["", "| run | loss of the first step | of the last |", "|---|---|---|"]
    lines += [f"| {name} | {first:.3f} | {last:.4f} |" for name, (first, last) in losses.items()]
    lines += ["", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in {**seconds, "all": sum(seconds.values())}.items()]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    lines += ["", f"Machine: {machine}; Python {platform.python_version()}, jax {jax.__version__}."]
    return "\n".join(lines)


def compared_with_peft(base: Path, run: Path) -> str:
    """A sentence on the logits of the decoder against those of peft, for a run with LoRA."""
    difference, largest = largest_difference(base, run / "adapter", run / "model")
    return (
        "\n\nThe logits of the trained decoder and those that peft makes of the base and the exported adapter differ "
        f"by {difference:.1e} at most, where the largest is {largest:.0f} (benchmarks/accuracy/peft_parity.py)."
    )


def with_section(page: str, title: str, section: str) -> str:
    """Returns the page with a family's section in the place of its old one, in the order of `FAMILIES`."""
    old = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    sections = old | {title: f"\n{section}\n"}
    titles = [one for one, _ in FAMILIES.values() if one in sections]
    return HEAD + "".join(f"\n## {one}\n\n{sections[one].strip()}\n" for one in titles)


if __name__ == "__main__":
    sys.exit(main())
