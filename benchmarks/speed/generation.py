"""Measures the time to the first token and the tokens per second of vr_jax and of transformers.

    python -m benchmarks.speed.generation [--size quick] [--batch_size 1]

The model has LLaVA-OneVision-0.5B's shapes, and runs on this machine's device. Every alternative is a process of its
own, so that none waits for the threads or the memory of another. The processes take turns. The script fails where the
outputs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3  # The largest relative difference of float32 logits: ||ours - theirs|| / ||theirs||.
ROUNDING = 2.0  # In bfloat16 our distance to the float32 logits may be this many times that of transformers.

Report = dict[str, Any]


class Side:
    """A process of `benchmarks.speed.generation_sides`.

    Every method that waits for the process raises RuntimeError where the process fails or does not answer in time. The
    message holds the end of what it printed.
    """

    def __init__(self, name: str, folder: Path, deadline: float, **flags: Any):
        """Starts the process.

        Args:
            name: The name of the side in messages.
            folder: A folder for its files.
            deadline: The time of `time.monotonic` until which it must answer.
            **flags: The flags of `generation_sides`.
        """
        command = [sys.executable, "-m", "benchmarks.speed.generation_sides", f"--folder={folder}"]
        for flag, value in flags.items():
            command += [f"--{flag}"] if value is True else [f"--{flag}={value}"] if value not in (None, False) else []
        self.name, self.deadline, self.folder = name, deadline, folder
        self.log = (folder / "log").open("w+")
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def answer(self) -> Any:
        """Waits for the next line of JSON that the process prints."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, self.deadline - time.monotonic())):
                self.kill()
                raise RuntimeError(f"{self.name}: out of time")
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name}: exit status {self.process.wait()}\n{self.log.read()[-1500:]}")
        return json.loads(line)

    def run(self) -> Any:
        """Generates once; returns the seconds to the first token and those of the others."""
        assert self.process.stdin is not None
        print("run", file=self.process.stdin, flush=True)
        return self.answer()

    def finish(self) -> tuple[Report, dict[str, np.ndarray]]:
        """Ends the process; returns its numbers (memory, device) and its outputs."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        numbers = self.answer()
        self.process.wait()
        (file,) = self.folder.glob("*.npz")
        with np.load(file) as arrays:
            return numbers, dict(arrays)

    def kill(self) -> None:
        """Ends the process at once, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(sides: dict[str, Report], *, rounds: int, warmup: int, timeout: float) -> Report:
    """Runs several sides in turns.

    Args:
        sides: The flags of `generation_sides` for each side, by the side's name.
        rounds: Timed runs of each side.
        warmup: Runs before these, which are not timed.
        timeout: Seconds for everything.

    Returns:
        Seconds, memory and outputs of each side. For a side that fails there is its error, and the others continue.
    """
    deadline = time.monotonic() + timeout
    found: Report = {}
    with tempfile.TemporaryDirectory() as scratch:
        alive: dict[str, Side] = {}
        try:
            for name, flags in sides.items():
                folder = Path(scratch) / name.replace("/", "_")
                folder.mkdir()
                alive[name] = Side(name, folder, deadline, **flags)
                found[name] = {"first": [], "decode": []}
                try:  # One side starts at a time, because drawing the weights takes memory and all cores.
                    assert alive[name].answer() == "ready"
                except RuntimeError as error:
                    found[name]["error"] = str(error)
            for turn in range(warmup + rounds):
                for name, side in alive.items():
                    if "error" in found[name]:
                        continue
                    try:
                        seconds = side.run()
                    except RuntimeError as error:
                        found[name]["error"] = str(error)
                        continue
                    if turn >= warmup:
                        for part, value in seconds.items():
                            found[name][part].append(value)
            for name, side in alive.items():
                if "error" not in found[name]:
                    try:
                        numbers, arrays = side.finish()
                        found[name] |= numbers | {"arrays": arrays}
                    except RuntimeError as error:
                        found[name]["error"] = str(error)
        finally:
            for side in alive.values():
                side.kill()
    return found


def against_torch(
    size: str,
    *,
    dtype: str,
    batch_size: int = 1,
    new_tokens: int = 16,
    rounds: int = 5,
    warmup: int = 1,
    compiled: bool = False,
    wrong: bool = False,
    timeout: float = 3600,
) -> Report:
    """Compares vr_jax with transformers on LLaVA-OneVision's shapes.

    Args:
        size: "0.5b", "quick" or "tiny" (see `onevision`).
        dtype: Type of parameters and activations.
        batch_size: Equal prompts in a batch.
        new_tokens: Tokens that are generated.
        rounds: Timed runs of each side.
        warmup: Runs before these, which are not timed.
        compiled: Whether transformers with torch.compile is a third side.
        wrong: Whether our side gets wrong parameters, for the test that this is noticed.
        timeout: Seconds for everything.

    Returns:
        `sides` holds the numbers of each side, and `ratio` the medians of transformers divided by ours. `agreement`
        tells whether the outputs are equal up to rounding; if they are not, the times mean nothing.
    """
    names = ("vr_jax", "torch", "torch_compiled") if compiled else ("vr_jax", "torch")
    common = {"size": size, "dtype": dtype, "batch_size": batch_size, "new_tokens": new_tokens}
    sides = {
        name: {"side": name, "logits": name != "torch_compiled", "wrong": wrong and name == "vr_jax", **common}
        for name in names
    }
    found = measure(sides, rounds=rounds, warmup=warmup, timeout=timeout)
    report: Report = {
        **common,
        "sides": {name: side_numbers(side, batch_size, new_tokens) for name, side in found.items()},
    }
    if errors := {name: side["error"] for name, side in found.items() if "error" in side}:
        report["errors"] = errors
    if not {"vr_jax", "torch"} & set(errors):
        report["agreement"] = agreement(found["vr_jax"]["arrays"], found["torch"]["arrays"])
    report["ratio"] = {
        other: {
            "first": _median(found[other]["first"]) / _median(found["vr_jax"]["first"]),
            "decode": _median(found[other]["decode"]) / _median(found["vr_jax"]["decode"]),
        }
        for other in names[1:]
        if found[other]["first"] and found["vr_jax"]["first"]
    }
    return report


def agreement(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Report:
    """Compares the outputs of vr_jax and transformers.

    In float32 they agree if the logits of the first token differ by at most `TOLERANCE` and the greedy tokens are the
    same. In bfloat16 they agree if our logits are no further from transformers' float32 pass with the same parameters
    than `ROUNDING` times theirs.
    """

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    same = ours["tokens"] == theirs["tokens"]
    report: Report = {
        "logits": distance(ours["logits"], theirs["logits"]),
        "equal_tokens": int(np.sum(np.cumprod(same, axis=1))),
        "tokens": int(same.size),
    }
    if "reference" not in theirs:
        return report | {"agree": report["logits"] <= TOLERANCE and bool(same.all())}
    exact = theirs["reference"]
    report |= {
        "ours_to_float32": distance(ours["logits"], exact),
        "theirs_to_float32": distance(theirs["logits"], exact),
    }
    return report | {"agree": report["ours_to_float32"] <= ROUNDING * report["theirs_to_float32"]}


def _median(values: list[float]) -> float:
    return statistics.median(values)


def side_numbers(side: Report, batch_size: int, new_tokens: int) -> Report:
    """The numbers of a side without its arrays, and its tokens per second."""
    kept = {name: value for name, value in side.items() if name != "arrays"}
    if side["decode"]:
        kept["tokens_per_s"] = batch_size * (new_tokens - 1) / _median(side["decode"])
    return kept


def median_ms(side: Report) -> float | None:
    """The median milliseconds to the first token, or None where nothing was measured."""
    return 1e3 * _median(side["first"]) if side.get("first") else None


def text_of(report: Report) -> str:
    """The report as text: the ratios, every side, and whether the outputs agree."""
    head = f"LLaVA-OneVision {report['size']}, {report['dtype']}, batch {report['batch_size']}"
    lines = [head]
    for other, ratio in report["ratio"].items():
        lines.append(f"  against {other}: first token x {ratio['first']:.2f}, decode x {ratio['decode']:.2f}")
    lines += [f"  {line}" for line in side_lines(report["sides"])]
    if "agreement" in report:
        found = report["agreement"]
        verdict = "agree" if found["agree"] else "DIFFER: the times mean nothing"
        reference = (
            f"; to float32 ours {found['ours_to_float32']:.1e}, theirs {found['theirs_to_float32']:.1e}"
            if "ours_to_float32" in found
            else ""
        )
        lines.append(
            f"  outputs {verdict}: logits of the first token differ by {found['logits']:.1e}{reference}; "
            f"{found['equal_tokens']} of {found['tokens']} greedy tokens equal from the start"
        )
    return "\n".join(lines)


def side_lines(sides: Report) -> list[str]:
    """One line for each side."""
    lines = []
    for name, side in sides.items():
        if "error" in side:
            lines.append(f"{name:<20} not measured: {side['error'].strip().splitlines()[-1]}")
        if not side["first"]:
            continue
        first = [1e3 * value for value in side["first"]]
        peak = side.get("peak_bytes")
        lines.append(
            f"{name:<20} first token {_median(first):10.2f} ms ({min(first):.2f} .. {max(first):.2f})  "
            f"{side['tokens_per_s']:9.2f} tokens/s  peak "
            + ("not counted by this device" if peak is None else f"{peak / 1e6:,.0f} MB")
        )
    return lines


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--size", default="0.5b", choices=("0.5b", "quick", "tiny"))
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--batch_size", type=int, default=1)
    flags.add_argument("--new_tokens", type=int, default=16)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--wrong", action="store_true", help="our side with a wrong layer: must be noticed")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Measures both sides and prints their ratio."""
    options = parser().parse_args(arguments)
    report = against_torch(
        options.size,
        dtype=options.dtype,
        batch_size=options.batch_size,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        wrong=options.wrong,
    )
    print(text_of(report))
    return 0 if report.get("agreement", {}).get("agree") else 1


if __name__ == "__main__":
    sys.exit(main())
