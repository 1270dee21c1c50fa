"""Compares one update of phase 2 with transformers and torch.optim.AdamW, on the same weights and samples.

    python -m benchmarks.speed.training_step [--size 0.5b] [--rounds 10] [--remat full]

The model is the pooling baseline at 1/9, which both sides can express: transformers' SigLIP and Qwen2 with a mean over
windows between them. The encoder is frozen, the trained weights are float32, and products are in bfloat16 (on a CPU in
float32). Every decoder layer is recomputed in the backward pass; --remat changes that for vr_jax.

vr_jax packs four samples into each row, and torch has one sample in each row. All samples are equally long, so neither
side pads. The losses of the first three updates must agree, and from the second on they depend on the gradients. Each
side runs in a process of its own, one after the other, so they do not share a GPU's memory. The peak memory of vr_jax
is counted by the device, and that of torch by its allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SIDES = ("vr_jax", "torch")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # The largest relative difference of a loss.


def training_report(
    size: str,
    *,
    rounds: int = 10,
    dtype: str = "bfloat16",
    timeout: float = 600,
    remat: str = "full",
    torch: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures both sides.

    Args:
        size: "0.5b", "1.5b", "7b" or "tiny".
        rounds: Timed updates of each side.
        dtype: Type of the products.
        timeout: Seconds for each side.
        remat: What vr_jax recomputes in the backward pass.
        torch: The side of torch from an earlier report, which is then not measured again.

    Returns:
        Both sides, their ratio, and whether their losses agree.

    Raises:
        RuntimeError: A side failed or took too long. The message holds the end of what it printed.
    """
    sides = {"vr_jax": _in_a_process("vr_jax", size, rounds, dtype, timeout, remat)}
    sides["torch"] = torch or _in_a_process("torch", size, rounds, dtype, timeout, remat)
    medians = {side: statistics.median(sides[side]["seconds"]) for side in SIDES}
    differences = [
        abs(a - b) / abs(b) for a, b in zip(sides["vr_jax"]["losses"], sides["torch"]["losses"], strict=True)
    ]
    samples, flops, peak = (sides["vr_jax"][name] for name in ("samples", "model_flops", "peak_flops"))
    return {
        "size": size,
        "dtype": dtype,
        "remat": remat,
        "ratio": medians["torch"] / medians["vr_jax"],
        "samples": samples,
        "samples_per_s": {side: samples / medians[side] for side in SIDES},
        "mfu": {side: flops / medians[side] / peak if peak else None for side in SIDES},
        "loss_difference": differences,
        "agree": max(differences) < TOLERANCE[dtype],
        "sides": sides,
    }


def _in_a_process(side: str, size: str, rounds: int, dtype: str, timeout: float, remat: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.training_step",
        f"--side={side}",
        f"--size={size}",
        f"--rounds={rounds}",
        f"--dtype={dtype}",
    ]
    command.append(f"--remat={remat}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{side}, {size}: more than {timeout:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{side}, {size}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def text_of(report: dict[str, Any]) -> str:
    """The report as text, the ratio first."""
    lines = [
        f"one update, {report['size']}, {report['dtype']}, remat {report['remat']}, {report['samples']} samples: "
        f"{report['ratio']:.2f} x the samples per second of transformers + AdamW"
    ]
    for side in SIDES:
        seconds, memory = report["sides"][side]["seconds"], report["sides"][side]["peak_bytes"]
        mfu = report["mfu"][side]
        lines.append(
            f"  {side:<8} {statistics.median(seconds) * 1e3:9.1f} ms ({min(seconds) * 1e3:.1f} .. "
            f"{max(seconds) * 1e3:.1f})  {report['samples_per_s'][side]:8.2f} samples/s"
            f"  MFU {'not known for this device' if mfu is None else f'{mfu:.1%}'}"
            f"  peak {'not counted by this device' if memory is None else f'{memory / 2**20:,.0f} MiB'}"
        )
    verdict = "agree" if report["agree"] else "DIFFER: the times mean nothing"
    lines.append(f"  losses {verdict} (relative difference {', '.join(f'{d:.1e}' for d in report['loss_difference'])})")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--size", default="0.5b", choices=("0.5b", "1.5b", "7b", "tiny"))
    flags.add_argument("--rounds", type=int, default=10, help="timed updates of each side, after two for warming up")
    flags.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the products; default: float32 on a CPU, else bfloat16",
    )
    flags.add_argument(
        "--remat",
        default="full",
        choices=("full", "dots", "none"),
        help="what vr_jax recomputes in the backward pass (default: %(default)s)",
    )
    flags.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Measures both sides, or one of them with --side, and prints the result."""
    options = parser().parse_args(arguments)
    from benchmarks.speed import training_sides, training_work

    if options.side:
        work = training_work.work(options.size, options.dtype, options.remat)
        run = {"vr_jax": training_sides.run_vr_jax, "torch": training_sides.run_torch}[options.side]
        print(json.dumps({"samples": work.samples, **run(work, options.rounds)}))
        return 0
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    report = training_report(options.size, rounds=options.rounds, dtype=dtype, remat=options.remat)
    print(text_of(report))
    return 0 if report["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
