"""Everything that wants a GPU, in one command of under nine minutes:

    python benchmarks/gpu.py --output docs/results/gpu [--minutes 8.5] [--only PART ...] [--tiny]

Takes the installed jax (0.11 or newer), flax, torch and transformers as they are, and needs neither the package
installed nor grain, ml_collections or tensorflow-datasets. The parts, in this order:

    first_token     LLaVA-OneVision-0.5B shapes, batch 1 and 16, against transformers, eager and compiled
    vision_remember LLaVA-VR at 1/9 against its own baseline and the uncompressed model (Fig. 4, Table 5d), with memory
    training        one update of phase 2 at 0.5B and 1.5B against transformers + AdamW
    kernels         windowed cross-attention: backends side by side, against a copy

Every program runs in a process of its own, so that none takes another's memory. results.json and results.md in the
output folder are written after each part; a part that fails, or for which no time is left, is named there with the
reason. --tiny: the same with tiny shapes, to see that it works, on a CPU too."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inference_speed
import training_step

ROOT = Path(__file__).resolve().parents[1]
# Issue 5's goals on one H200.
FIRST_TOKEN_S, FIRST_TOKEN_RATIO, TOKENS_PER_S = 6e-3, 5.0, 2000.0
REMEMBER_SHARE, REMEMBER_BYTES, MFU, COPY_SHARE = 0.03, 120e6, 0.55, 0.70
LEAST_SECONDS = 20.0  # no program is started with less time left


@dataclass
class Run:
    """What a part may use, and what it says."""

    tiny: bool
    deadline: float
    lines: list[str] = field(default_factory=list)
    goals: list[tuple[str, str, bool]] = field(default_factory=list)

    def left(self) -> float:
        """Seconds. Raises OutOfTime where too few are left to start anything."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            raise OutOfTime(f"{left:.0f} s were left")
        return left

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def goal(self, what: str, found: str, reached: bool, *, of_tiny: bool = False) -> None:
        """of_tiny: judged for tiny shapes, too."""
        if self.tiny and not of_tiny:
            return
        self.goals.append((what, found, reached))
        print(f"  goal {'reached' if reached else 'MISSED'}: {what}: {found}", flush=True)


class OutOfTime(Exception):
    pass


def options(run: Run, **changes: Any) -> dict[str, Any]:
    base = {"system": "onevision", "dtype": "bfloat16", "batches": [1], "new_tokens": 128, "rounds": 8, "warmup": 2}
    if run.tiny:
        base |= {"new_tokens": 6, "rounds": 2, "warmup": 1}
        changes |= {"system": "tiny"}
    return base | changes


def first_token(run: Run) -> dict[str, Any]:
    found = inference_speed.inference_reports(options(run, batches=[1, 16]), compiled=_cuda(), timeout=run.left())
    for report in found.values():
        run.say(inference_speed.text_of(report))
    run.goal(
        "outputs agree with transformers",
        f"batch {list(found)}",
        all(report["agree"] for report in found.values()),
        of_tiny=True,
    )
    ours, ratio = found[1]["speeds"]["vr_jax"], found[1]["ratios"]["torch"]
    seconds, rate = ours["first_token_s"], ours["tokens_per_s"]
    run.goal("first token, batch 1, <= 6 ms", f"{seconds * 1e3:.2f} ms", seconds <= FIRST_TOKEN_S)
    run.goal(
        "first token >= 5 x eager transformers",
        f"{ratio['first_token']:.2f} x",
        ratio["first_token"] >= FIRST_TOKEN_RATIO,
    )
    run.goal("decode, batch 1, >= 2,000 tokens/s", f"{rate:,.0f} tokens/s", rate >= TOKENS_PER_S)
    return found


def vision_remember(run: Run) -> dict[str, Any]:
    found = {}
    for system in ("baseline", "vision_remember", "uncompressed"):
        settings = options(run, system=system, rounds=20)
        found[system] = inference_speed.run_side("vr_jax", settings, timeout=run.left())[1]
        del found[system]["logits"]
        run.say(inference_speed.side_text(system, found[system], settings))
    plain, remember = found["baseline"], found["vision_remember"]
    added = statistics.median(remember["first"]) / statistics.median(plain["first"]) - 1
    run.goal("Vision Remember adds <= 3 % to the first token", f"{added:+.1%}", added <= REMEMBER_SHARE)
    if plain["peak_bytes"] is not None:
        weights = remember["parameter_bytes"] - plain["parameter_bytes"]
        more = remember["peak_bytes"] - plain["peak_bytes"] - weights
        beyond = f"... and <= 120 MB beyond its weights ({weights / 1e6:.0f} MB)"
        run.goal(
            beyond,
            f"{more / 1e6:+.0f} MB",
            more <= REMEMBER_BYTES,
        )
    return found


def training(run: Run) -> dict[str, Any]:
    found = {}
    for size in ("tiny",) if run.tiny else ("1.5b", "0.5b"):
        report = training_step.training_report(size, rounds=2 if run.tiny else 8, timeout=run.left())
        found[size] = report
        run.say(training_step.text_of(report))
        run.goal(f"losses agree, {size}", f"{max(report['loss_difference']):.1e}", report["agree"], of_tiny=True)
        mfu = report["mfu"]["vr_jax"]
        if size == "1.5b" and mfu is not None:
            run.goal("MFU of phase 2 at 1.5B >= 55 %", f"{mfu:.1%}", mfu >= MFU)
    return found


def kernels(run: Run) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _kernels(run, Path(folder) / "kernels.json")


def _kernels(run: Run, numbers: Path) -> dict[str, Any]:
    script = ROOT / "benchmarks" / "kernels.py"
    command = [sys.executable, str(script), f"--json={numbers}", *(["--tiny"] if run.tiny else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=run.left(), check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"kernels.py: exit status {done.returncode}\n{done.stderr[-2000:]}")
    run.say(done.stdout.rstrip())
    found = json.loads(numbers.read_text())
    for case in found["window_attention"]:
        kernel, reference = case["backends"]["pallas_gpu"], case["backends"]["reference"]
        if "of_copy" in kernel:
            of_copy, faster = kernel["of_copy"], kernel["of_copy"] / reference["of_copy"]
            text, reached = f"{of_copy:.0%} of a copy, {faster:.2f} x XLA", of_copy >= COPY_SHARE and faster >= 1
        else:
            text, reached = f"did not run: {kernel}", False
        run.goal(f"window kernel, {case['form']} {case['part']}: >= 70 % of a copy, >= XLA", text, reached)
    return found


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "first_token": first_token,
    "vision_remember": vision_remember,
    "training": training,
    "kernels": kernels,
}


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers")},
    }


def write(folder: Path, found: dict[str, Any], run: Run) -> None:
    """Both files, whole, so that a run that is killed leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    goals = [f"| {what} | {value} | {'reached' if reached else '**missed**'} |" for what, value, reached in run.goals]
    text = [
        "# One GPU: vr_jax against PyTorch\n",
        f"`python benchmarks/gpu.py`{' --tiny' if run.tiny else ''}; {versions}. Medians (lowest .. highest).\n",
        "| goal | found | |\n|---|---|---|",
        *goals,
        "\n```",
        *run.lines,
        "```\n",
        *[f"* {name}: not measured: {reason}" for name, reason in found["not_measured"].items()],
    ]
    for name, content in (("results.json", json.dumps(found, indent=1)), ("results.md", "\n".join(text) + "\n")):
        temporary = folder / f".{name}"
        temporary.write_text(content)
        temporary.replace(folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of results.json and results.md")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing is started or waited for")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too")
    flags = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that peaks are what was needed
    run = Run(flags.tiny, time.monotonic() + 60 * flags.minutes)
    found: dict[str, Any] = {"machine": machine(), "parts": {}, "not_measured": {}}
    print(found["machine"], flush=True)
    for name in flags.only:
        run.say(f"\n{name}")
        start = time.monotonic()
        try:
            found["parts"][name] = PARTS[name](run)
        except (OutOfTime, RuntimeError, subprocess.TimeoutExpired) as error:
            found["not_measured"][name] = str(error)
            run.say(f"  not measured: {error}")
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
        found["goals"] = run.goals
        write(flags.output, found, run)
    print(f"\n{flags.output / 'results.md'}")
    return 1 if found["not_measured"] or not all(reached for _, _, reached in run.goals) else 0


if __name__ == "__main__":
    sys.exit(main())
