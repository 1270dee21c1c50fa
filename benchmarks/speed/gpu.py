"""Compares vr_jax with PyTorch, and Vision Remember with its baseline, on one GPU in under nine minutes.

    python -m benchmarks.speed.gpu --output=runs/gpu [--minutes 8.5]
    python -m benchmarks.speed.gpu --output=runs/gpu_tiny --tiny

With --tiny all shapes are tiny, which shows on any device that the script works. The script needs the dependencies of
this project, torch and transformers; the project itself need not be installed. The parts run in the order of their
importance. The results of each are written to OUTPUT as soon as it is done, as a JSON file and as a page, so that a
run that is cut off still leaves results. A part for which there is no time is named in the page.

The two frameworks never share a process. The sides of a comparison are in memory together and take turns, except in
training, where they run one after the other. JAX does not preallocate memory. Its peak is counted by the device, and
that of PyTorch by its allocator. Decoding takes the greedy tokens, and no token ends a reply.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.goals import Goal, goals_of, lines_of
from benchmarks.speed import generation, training_step

ROOT = Path(__file__).resolve().parents[2]

SYSTEMS = ("uncompressed", "baseline 1/9", "Vision Remember 1/9")
LEAST_SECONDS = 30.0  # A part with less time left than this is not started.

Report = dict[str, Any]


def first_token_and_decode(batch_size: int, dtype: str, compiled: bool) -> Callable[[Report, bool, float], str]:
    """The part that compares LLaVA-OneVision-0.5B with transformers."""

    def part(results: Report, tiny: bool, seconds: float) -> str:
        found = generation.against_torch(
            "tiny" if tiny else "0.5b",
            dtype=dtype,
            batch_size=batch_size,
            new_tokens=8 if tiny else 64,
            rounds=2 if tiny else 7,
            warmup=1 if tiny else 2,
            compiled=compiled and not tiny,
            timeout=seconds,
        )
        results.setdefault("against_torch", {})[f"batch {batch_size}, {dtype}"] = found
        return generation.text_of(found)

    return part


def paper_systems(results: Report, tiny: bool, seconds: float) -> str:
    """Measures time and memory of the uncompressed model, of 1/9, and of 1/9 with Vision Remember.

    Source: paper, Figure 4 and Table 5d.
    """
    sides = {
        name: {
            "side": "vr_jax",
            "size": "tiny" if tiny else "0.5b",
            "system": name,
            "dtype": "bfloat16",
            "batch_size": 1,
            "new_tokens": 8 if tiny else 64,
        }
        for name in SYSTEMS
    }
    found = generation.measure(sides, rounds=2 if tiny else 15, warmup=1 if tiny else 3, timeout=seconds)
    shown = {name: generation.side_numbers(side, 1, 8 if tiny else 64) for name, side in found.items()}
    results["systems"] = shown
    return "\n".join(["Fig. 4 and Table 5d, Qwen2-0.5B, AnyRes4", *(f"  {x}" for x in generation.side_lines(shown))])


def training(size: str) -> Callable[[Report, bool, float], str]:
    """The part that compares one update of phase 2 with transformers."""

    def part(results: Report, tiny: bool, seconds: float) -> str:
        found = training_step.training_report(
            "tiny" if tiny else size, rounds=2 if tiny else 8, dtype="float32" if tiny else "bfloat16", timeout=seconds
        )
        results.setdefault("training", {})[size] = found
        return training_step.text_of(found)

    return part


def with_less_remat(size: str, remat: str) -> Callable[[Report, bool, float], str]:
    """The part that repeats an update of phase 2 with more activations kept in memory than the config file keeps."""

    def part(results: Report, tiny: bool, seconds: float) -> str:
        default = results.get("training", {}).get(size)
        if default is None:
            return f"skipped: the training step of {size} did not run"
        found = training_step.training_report(
            default["size"],
            rounds=2 if tiny else 8,
            dtype=default["dtype"],
            timeout=seconds,
            remat=remat,
            torch=default["sides"]["torch"],
        )
        results["training"][f"{size}, remat {remat}"] = found
        return training_step.text_of(found)

    return part


def window_kernel(results: Report, tiny: bool, seconds: float) -> str:
    """Measures the kernels in a process of its own, because this process must not hold the device."""
    with tempfile.TemporaryDirectory() as scratch:
        numbers = Path(scratch) / "kernels.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.kernels.window_attention",
            "--rounds=10",
            f"--json={numbers}",
            *(["--tiny"] if tiny else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT)
        if numbers.exists():  # A run in which one kernel failed writes it too.
            results["window_kernel"] = json.loads(numbers.read_text())
    if done.returncode:
        raise RuntimeError(
            f"benchmarks.kernels.window_attention: exit status {done.returncode}\n{done.stdout}\n{done.stderr[-1500:]}"
        )
    return done.stdout.strip()


PARTS: dict[str, Callable[[Report, bool, float], str]] = {
    "first token and decode, batch 1, bfloat16": first_token_and_decode(1, "bfloat16", True),
    "Vision Remember": paper_systems,
    "training step, 1.5B": training("1.5b"),
    "first token and decode, batch 16, bfloat16": first_token_and_decode(16, "bfloat16", False),
    "training step, 0.5B": training("0.5b"),
    "window kernel": window_kernel,
    "training step, 1.5B, remat dots": with_less_remat("1.5b", "dots"),
    "training step, 0.5B, remat dots": with_less_remat("0.5b", "dots"),
    "outputs in float32": first_token_and_decode(1, "float32", False),
}
TINY_PARTS = (
    *("first token and decode, batch 1, bfloat16", "Vision Remember", "training step, 0.5B", "window kernel"),
    "training step, 0.5B, remat dots",
)


def goals(results: Report) -> list[Goal]:
    """The goals for one H200, and what this run measured."""
    batch1 = results.get("against_torch", {}).get("batch 1, bfloat16", {})
    ours, ratio = batch1.get("sides", {}).get("vr_jax", {}), batch1.get("ratio", {}).get("torch", {})
    systems = results.get("systems", {})
    base, remember = systems.get(SYSTEMS[1], {}), systems.get(SYSTEMS[2], {})
    mfu, dots = (
        (results.get("training", {}).get(name, {}).get("mfu") or {}).get("vr_jax")
        for name in ("1.5b", "1.5b, remat dots")
    )
    return goals_of(
        [
            ("first token, 0.5B, ms", "<=", 6.0, generation.median_ms(ours)),
            ("first token against eager transformers", ">=", 5.0, ratio.get("first")),
            ("decode, batch 1, tokens/s", ">=", 2000.0, ours.get("tokens_per_s")),
            ("Vision Remember: first token, % more", "<=", 3.0, _more(base, remember)),
            ("Vision Remember: MB beyond its weights", "<=", 120.0, _memory(base, remember)),
            ("training MFU, 1.5B phase 2, %", ">=", 55.0, None if mfu is None else 100 * mfu),
            ("training MFU, 1.5B phase 2, remat dots, %", ">=", 55.0, None if dots is None else 100 * dots),
            *_of_kernels(results.get("window_kernel", {}).get("window_attention", [])),
        ]
    )


def _of_kernels(cases: list[Report]) -> Iterator[tuple[str, str, float, float | None]]:
    """The goals of the GPU kernel at the shapes of training. A kernel that did not run, or is wrong, has no number."""
    for case in cases:
        what = f"window kernel, {case['form']} {case['part']}"
        found = (case["backends"].get(name, {}) for name in ("pallas_gpu", "reference"))
        kernel, reference = (one.get("of_copy") if one.get("agrees") else None for one in found)
        yield f"{what}, % of a copy's bandwidth", ">=", 70.0, None if kernel is None else 100 * kernel
        yield f"{what}, speed against XLA", ">=", 1.0, kernel / reference if kernel and reference else None


def _more(base: Report, other: Report) -> float | None:
    first, second = generation.median_ms(base), generation.median_ms(other)
    return None if first is None or second is None else 100 * (second / first - 1)


def _memory(base: Report, other: Report) -> float | None:
    if base.get("peak_bytes") is None or other.get("peak_bytes") is None:
        return None
    weights = other["parameter_bytes"] - base["parameter_bytes"]
    return (other["peak_bytes"] - base["peak_bytes"] - weights) / 1e6


def machine() -> Report:
    """The device, the number of cores and the versions of the packages."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "no NVIDIA GPU"
    packages = {name: installed(name) for name in ("jax", "flax", "torch", "transformers")}
    return {"gpu": gpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def write(output: Path, results: Report, texts: dict[str, str]) -> None:
    """Writes the results as JSON and as a page."""
    lines = [f"{name} {value}" for name, value in results["machine"].items()]
    found = goals(results)
    blocks = [
        ", ".join(lines),
        *(f"{name}\n{text}" for name, text in texts.items()),
        "\n".join(lines_of(found)),
    ]
    page = "# Against PyTorch on a GPU\n\n" + "\n\n".join(f"```\n{block}\n```" for block in blocks) + "\n"
    results["goals"] = [goal.to_dict() for goal in found]
    for name, text in (("gpu.json", json.dumps(results, indent=1)), ("gpu.md", page)):
        temporary = output / f".{name}"
        temporary.write_text(text)
        temporary.replace(output / name)


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=arguments.path, required=True, help="folder of gpu.json and gpu.md")
    flags.add_argument("--minutes", type=float, default=8.5, help="minutes after which every part is stopped")
    flags.add_argument("--tiny", action="store_true", help="tiny shapes and few parts, to see that they work")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts for which there is time, and writes the results after each."""
    options = parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results: Report = {"machine": machine()}
    texts: dict[str, str] = {}
    failed = False
    for name in TINY_PARTS if options.tiny else PARTS:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            texts[name] = f"skipped: {max(left, 0):.0f} s left of {options.minutes:g} minutes"
        else:
            start = time.monotonic()
            try:
                texts[name] = PARTS[name](results, options.tiny, left)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                texts[name], failed = f"failed: {error}", True
            results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        print(f"\n{texts[name]}", flush=True)
        write(options.output, results, texts)
    if not options.tiny:
        print("\n".join(["", *lines_of(goals(results))]))
    compared = [*results.get("against_torch", {}).values(), *results.get("training", {}).values()]
    different = [one for one in compared if not one.get("agree", one.get("agreement", {}).get("agree"))]
    if different:
        print(f"{len(different)} of {len(compared)} comparisons DIFFER or lack a side", file=sys.stderr)
    return 1 if different or failed else 0


if __name__ == "__main__":
    sys.exit(main())
