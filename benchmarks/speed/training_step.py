"""One update of phase 2, vr_jax against transformers + torch.optim.AdamW, on the same weights and samples.

    python -m benchmarks.speed.training_step [--size 0.5b] [--rounds 10] [--remat full]     sizes: 0.5b, 1.5b, 7b, tiny

The model is the pooling baseline at 1/9, which both sides can express (transformers' SigLIP and Qwen2, a mean over
windows between them): frozen encoder, float32 master weights, products in bfloat16 (float32 on a CPU), every decoder
layer recomputed in the backward pass (--remat: for vr_jax something else). vr_jax packs four samples into each row,
torch has one in each row; all samples are equally long, so that nothing is padded on either side. The losses of the
first updates must agree: the second depends on the gradients of the first. Each side runs in a process of its own, one
after the other, and so does not share a GPU's memory. Memory is the device's own peak for vr_jax, the allocator's for
torch."""

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
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # relative, of a loss


def training_report(
    size: str,
    *,
    rounds: int = 10,
    dtype: str = "bfloat16",
    timeout: float = 600,
    remat: str = "full",
    torch: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Both sides, their ratio, and whether they agree. torch: its side of an earlier report, not to be run again.

    Raises RuntimeError with the end of what a side printed if it failed or took longer than `timeout` seconds."""
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
    """A few lines to read, the ratio first."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b", choices=("0.5b", "1.5b", "7b", "tiny"))
    parser.add_argument("--rounds", type=int, default=10, help="timed updates of each side, after two for warming up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--remat", default="full", choices=("full", "dots", "none"), help="of vr_jax (%(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
