"""Plans of the paper's recipes for pods that nobody holds: docs/results/plan.json and the table in plan.md beside it.

    python -m benchmarks.speed.pod_plans [--jobs=2] [--optimization_level=O1] [--minutes=30]

Needs both compilers: pip install 'vr-jax[tpu,cuda13]'. Each plan is a process of `vr-jax plan`, whose results
are kept in runs/pod_plans: the same command goes on where it was stopped. What is not planned yet is named below the
table."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vr_jax.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE, DATA, WORK = ROOT / "docs/results/plan.md", ROOT / "docs/results/plan.json", ROOT / "runs/pod_plans"
BEGIN, END = "<!-- table: benchmarks/speed/pod_plans.py -->", "<!-- end of the table -->"
GIB = 2**30
RECIPES = ("0_5b:phase1", "0_5b:phase2", "1_5b:phase2", "7b:phase2")
TOPOLOGIES = ("h200:1x1x8", "v5e:4x4", "h200:1x32x8", "v5e:16x16", "v5p:4x4x4", "tpu7x:2x2x2", "v5p:8x8x16")


@dataclass(frozen=True)
class Case:
    """flags: beside --config and --topology; none for the recipe as it is."""

    recipe: str
    topology: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> Path:
        parts = [self.recipe, self.topology, *(flag.rsplit(".", 1)[-1] for flag in self.flags)]
        return WORK / "_".join(parts).replace(":", "_").replace("=", "")


# (replica, fsdp) where the chips are more than the widths of a recipe's model divide by: those stay whole on each.
SMALLER = {
    ("h200:1x32x8", "0_5b"): (32, 8),
    ("v5e:16x16", "0_5b"): (16, 16),
    ("v5p:8x8x16", "0_5b"): (64, 16),
    ("v5p:8x8x16", "1_5b"): (32, 32),
    ("v5p:8x8x16", "7b"): (16, 64),
}


def cases() -> list[Case]:
    found = []
    for topology in TOPOLOGIES:
        for recipe in RECIPES:
            found.append(Case(recipe, topology, ()))
            if sizes := SMALLER.get((topology, recipe.partition(":")[0])):
                flags = (f"--config.mesh.replica={sizes[0]}", f"--config.mesh.fsdp={sizes[1]}")
                found.append(Case(recipe, topology, flags))
    return found


def run(case: Case, level: str | None) -> str:
    """Plans one case unless it was before; a line about it."""
    if (case.folder / "plan.json").exists():
        return "kept"
    command = [
        *(
            sys.executable,
            "-m",
            "vr_jax",
            "plan",
            f"--config=configs/llava_vr_qwen2_{case.recipe.replace(':', '.py:')}",
        ),
        *(f"--topology={case.topology}", f"--output={case.folder}", *case.flags),
    ]
    # Only the TPU's compiler takes much longer at its default.
    if level is not None and not case.topology.startswith("h"):
        command.append(f"--optimization_level={level}")
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    reason = "" if (case.folder / "plan.json").exists() else ": " + "".join(done.stderr.strip().splitlines()[-1:])
    if reason:
        case.folder.mkdir(parents=True, exist_ok=True)
        write_text(case.folder / "error.txt", reason[2:])
    return f"{time.perf_counter() - began:.0f} s, exit {done.returncode}{reason}"


def row(case: Case, plan: dict[str, Any]) -> list[str]:
    memory, work, roof = plan["memory"], plan["work"], plan["roofline"]
    temporaries, peak = memory["temporaries"], memory["peak"]
    cells = [
        case.recipe.replace("_", ".", 1).replace(":", " "),
        case.topology,
        " x ".join(str(size) for size in plan["mesh"].values()),
        f"{plan['settings']['rows']}",
        f"{memory['arguments'] / GIB:.2f}",
        "" if temporaries is None else f"{temporaries / GIB:.2f}",
        "" if peak is None else f"{peak / GIB:.2f}",
        f"{memory['capacity'] / GIB:.1f}",
        "yes" if memory["fits"] else "**no**",
    ]
    if work is None or roof is None:
        return [*cells, *[""] * 8, f"{plan['compile_seconds']:.0f}"]
    sent = sum(work["collective_bytes"].values())
    return [
        *cells,
        f"{work['flops'] / 1e12:.1f}",
        f"{work['hbm_bytes'] / 1e9:.0f}",
        f"{sent / 1e9:.1f}",
        f"{roof['compute'] * 1e3:.0f}",
        f"{roof['hbm'] * 1e3:.0f}",
        f"{roof['interconnect'] * 1e3:.0f}",
        f"{roof['mfu']:.0%}",
        f"{24 * 60 * plan['schedule']['days']:.3g}",
        f"{plan['compile_seconds']:.0f}",
    ]


HEAD = (
    *("recipe", "topology", "replica x fsdp x tensor", "rows", "state", "temporaries", "peak", "of", "fits"),
    *("TFLOP", "HBM, GB", "sent, GB", "FLOP/s, ms", "HBM, ms", "links, ms", "MFU bound", "minutes", "compiled, s"),
)


def write() -> None:
    """The data, and the table between its marks in the page."""
    planned, missing = [], []
    for case in cases():
        file, error = case.folder / "plan.json", case.folder / "error.txt"
        if file.exists():
            planned.append((case, json.loads(file.read_text())[0]))
        else:
            why = error.read_text().strip() if error.exists() else "not run"
            missing.append(f"* {case.recipe} on {case.topology} {' '.join(case.flags)}: {why}")
    rule = ["---", "---", "---", *["---:"] * (len(HEAD) - 3)]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, rule, *(row(case, plan) for case, plan in planned))]
    versions = sorted({f"{name} {number}" for _, plan in planned for name, number in plan["versions"].items()})
    levels = {f"{case.topology} {plan['settings']['optimization_level']}" for case, plan in planned}
    others = sorted(level for level in levels if not level.endswith(" default"))
    lines += ["", f"{', '.join(versions)}; optimization level: {', '.join(['default', *others])}."]
    if missing:
        lines += ["", "Not in the table:", "", *missing]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
    write_text(DATA, json.dumps([plan for _, plan in planned], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="plans at a time; each takes about 2 GB (%(default)s)")
    parser.add_argument("--optimization_level", choices=("O0", "O1", "O2", "O3"), help="of the TPU's compiler")
    parser.add_argument("--minutes", type=float, default=600, help="after which no further plan is begun")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes

    def one(case: Case) -> None:
        if time.monotonic() < until:
            print(case.folder.name, run(case, options.optimization_level), flush=True)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, cases()))
    write()


if __name__ == "__main__":
    main()
