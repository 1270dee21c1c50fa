"""First token and tokens per second of LLaVA-OneVision-0.5B shapes, vr_jax against transformers on the same weights.

    python benchmarks/inference_speed.py [--system onevision] [--batch 1] [--new_tokens 32] [--rounds 5] [--compiled]
    python benchmarks/inference_speed.py --text_layers 4 --vision_layers 4     a quick look at fewer layers

Random weights, one prompt of 60 text tokens and an AnyRes4 picture of five tiles (3,699 vision tokens), nothing ends a
reply early. The first token is counted from tiles and token ids in memory (uint8 on the host for vr_jax, normalised on
the device for transformers) to its id on the host; tokens per second are those behind it. Each side runs in a process
of its own, one after the other. Their logits behind the prompt must agree: in float32 with each other, in bfloat16 each
is compared with vr_jax in float32, and ours may not be further from it than 1.5 times theirs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed

SIDES = ("vr_jax", "torch", "torch_compiled")
FLOAT32_TOLERANCE = 1e-3  # of the logits' length
NO_WORSE = 1.5


def run_side(side: str, options: dict[str, Any], *, exact: bool = False, timeout: float = 600) -> dict[str, Any]:
    """One side in a process of its own: its result for each batch size, and with `exact` float32 logits ("exact").

    options: of `inference_work.work`, with `system`, `rounds` and `warmup`, and `batches` instead of `batch`. Raises
    RuntimeError with the end of what it printed if it failed or took longer than `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "logits.npz"
        given = json.dumps(options | {"exact": exact})
        command = [sys.executable, __file__, f"--side={side}", f"--options={given}", f"--logits={arrays}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{side}, {options['system']}: more than {timeout:.0f} s") from error
        if done.returncode:
            raise RuntimeError(f"{side}, {options['system']}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        results = json.loads(done.stdout.splitlines()[-1])
        with np.load(arrays) as found:
            logits = dict(found)
    return {
        **{int(batch): result | {"logits": logits[batch]} for batch, result in results.items()},
        **({"exact": logits["exact"]} if exact else {}),
    }


def speed(result: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Medians: seconds to the first token, tokens per second behind it, of all rows."""
    tokens = result["batch"] * (options["new_tokens"] - 1)
    return {
        "first_token_s": statistics.median(result["first"]),
        "tokens_per_s": tokens / statistics.median(result["rest"]),
    }


def inference_reports(
    options: dict[str, Any], *, compiled: bool = False, timeout: float = 600
) -> dict[int, dict[str, Any]]:
    """For each batch size all sides, their ratios, and whether they agree. Raises as `run_side`."""
    single = options["dtype"] == "float32"
    sides = {
        side: run_side(side, options, exact=side == "vr_jax" and not single, timeout=timeout)
        for side in SIDES[: 3 if compiled else 2]
    }
    reports = {}
    for batch in options["batches"]:
        exact = sides["vr_jax"][batch]["logits"] if single else sides["vr_jax"]["exact"]
        reports[batch] = compare({side: results[batch] for side, results in sides.items()}, exact, options)
    return reports


def compare(sides: dict[str, Any], exact: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    errors = {side: float(np.linalg.norm(r["logits"] - exact) / np.linalg.norm(exact)) for side, r in sides.items()}
    if options["dtype"] == "float32":
        agree = errors["torch"] < FLOAT32_TOLERANCE and sides["vr_jax"]["tokens"] == sides["torch"]["tokens"]
    else:
        agree = errors["vr_jax"] <= NO_WORSE * errors["torch"]
    speeds = {side: speed(result, options) for side, result in sides.items()}
    ours = speeds["vr_jax"]
    return {
        "options": options,
        "batch": sides["vr_jax"]["batch"],
        "error_of_logits": errors,
        "agree": agree,
        "speeds": speeds,
        "ratios": {
            side: {
                "first_token": speeds[side]["first_token_s"] / ours["first_token_s"],
                "tokens_per_s": ours["tokens_per_s"] / speeds[side]["tokens_per_s"],
            }
            for side in sides
            if side != "vr_jax"
        },
        "sides": {side: {k: v for k, v in result.items() if k != "logits"} for side, result in sides.items()},
    }


def text_of(report: dict[str, Any]) -> str:
    """A few lines to read, the ratios first."""
    options = report["options"]
    lines = [f"{options['system']}, {options['dtype']}, batch {report['batch']}, {options['new_tokens']} new tokens"]
    lines += [
        f"  against {side}: first token {ratio['first_token']:.2f} x sooner, {ratio['tokens_per_s']:.2f} x the tokens/s"
        for side, ratio in report["ratios"].items()
    ]
    lines += [side_text(side, report["sides"][side], options) for side in report["sides"]]
    verdict = "agree" if report["agree"] else "DIFFER: the times mean nothing"
    errors = ", ".join(f"{side} {error:.1e}" for side, error in report["error_of_logits"].items())
    return "\n".join([*lines, f"  outputs {verdict} (logits, relative to vr_jax in float32: {errors})"])


def side_text(name: str, result: dict[str, Any], options: dict[str, Any]) -> str:
    first, found, memory = result["first"], speed(result, options), result["peak_bytes"]
    return (
        f"  {name:<16} first token {found['first_token_s'] * 1e3:9.1f} ms ({min(first) * 1e3:.1f} .. "
        f"{max(first) * 1e3:.1f})  {found['tokens_per_s']:8.1f} tokens/s  peak "
        f"{'not counted by this device' if memory is None else f'{memory / 2**20:,.0f} MiB'}"
    )


def _side(side: str, options: dict[str, Any], arrays: str) -> None:
    import inference_sides as sides
    import inference_work

    rounds, warmup, batches, exact = (options.pop(name) for name in ("rounds", "warmup", "batches", "exact"))
    works = [inference_work.work(batch=batch, **options) for batch in batches]
    model = sides.vr_jax_model(works[0]) if side == "vr_jax" else sides.torch_model(works[0])
    results, logits = {}, {}
    for work in works:
        if side == "vr_jax":
            result = sides.run_vr_jax(work, model, rounds, warmup)
        else:
            result = sides.run_torch(work, model, rounds, warmup, compiled=side == "torch_compiled")
        logits[str(work.batch)] = result.pop("logits")
        results[work.batch] = result | {"batch": work.batch}
    if exact:
        del model
        logits["exact"] = sides.exact_logits(works[0])
    np.savez(arrays, **logits)
    print(json.dumps(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="onevision", choices=("onevision", "tiny"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="one size or several")
    for name, default in (("new_tokens", 32), ("rounds", 5), ("warmup", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("text_layers", "vision_layers"):
        parser.add_argument(f"--{name}", type=int, default=0, help="fewer layers, for a quick look; 0: all")
    parser.add_argument("--compiled", action="store_true", help="also transformers with torch.compile")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a side may take")
    for name in ("side", "options", "logits"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        _side(flags.side, json.loads(flags.options), flags.logits)
        return 0
    names = ("system", "new_tokens", "text_layers", "vision_layers", "rounds", "warmup")
    options = {name: getattr(flags, name) for name in names} | {"batches": flags.batch}
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    options["dtype"] = flags.dtype or ("float32" if on_cpu else "bfloat16")
    reports = inference_reports(options, compiled=flags.compiled, timeout=flags.timeout)
    print("\n".join(text_of(report) for report in reports.values()))
    return 0 if all(report["agree"] for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
