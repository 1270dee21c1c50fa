"""Plans the config files of the paper's two phases for pods of TPUs and GPUs, none of which is needed.

    python -m benchmarks.speed.pod_plans [--jobs=2] [--optimization_level=O1] [--minutes=30]

The results are docs/results/plan.json and the table of docs/results/plan.md. Both compilers must be installed:
pip install 'vr-jax[tpu,cuda13]'. Each plan is a process of `vr-jax plan`. Its results are kept in the work directory,
so the same command continues where it was stopped. A list below the table names what is not planned yet.

With --table6 the models of the paper's Table 6 take their place: docs/results/plan_table6.json and the table of
docs/results/plan_table6.md.

With --tiny one plan of configs/demo.py for the CPU takes their place, which shows that the script works.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import arguments
from vr_jax.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- table: benchmarks/speed/pod_plans.py -->", "<!-- end of the table -->"
GIB = 2**30
VARIANTS = ("0_5b:phase1", "0_5b:phase2", "1_5b:phase2", "7b:phase2")
TOPOLOGIES = ("h200:1x1x8", "v5e:4x4", "h200:1x32x8", "v5e:16x16", "v5p:4x4x4", "tpu7x:2x2x2", "v5p:8x8x16")


@dataclass(frozen=True)
class Case:
    """One plan.

    Attributes:
        variant: Size and phase, such as "0_5b:phase1"; or file and phase of Table 6, such as
            "table6/qwen2_5_vl:phase1"; or "demo".
        topology: The devices.
        flags: Further flags; none for the config file as it is.
    """

    variant: str
    topology: str
    flags: tuple[str, ...] = ()

    @property
    def config(self) -> str:
        """The config file and its variant."""
        if self.variant == "demo":
            return "configs/demo.py"
        if self.variant.startswith("table6/"):
            return f"configs/{self.variant.replace(':', '.py:')}"
        return f"configs/llava_vr_qwen2_{self.variant.replace(':', '.py:')}"

    @property
    def name(self) -> str:
        """The name of the folder with the results."""
        parts = [self.variant, self.topology, *(flag.rsplit(".", 1)[-1] for flag in self.flags)]
        return "_".join(parts).replace(":", "_").replace("=", "").replace("/", "_")


# A second mesh (replica, fsdp) where the model's widths cannot be divided by the number of chips. On the first mesh,
# all chips as `fsdp`, such parameters stay whole on every chip; a run without flags takes neither, but the largest
# `fsdp` that divides them.
SMALLER = {
    ("h200:1x32x8", "0_5b"): (32, 8),
    ("v5e:16x16", "0_5b"): (16, 16),
    ("v5p:8x8x16", "0_5b"): (64, 16),
    ("v5p:8x8x16", "1_5b"): (32, 32),
    ("v5p:8x8x16", "7b"): (16, 64),
}


TINY_CASES = (Case("demo", "cpu:1"),)
# Phase 2 costs most, and so comes first.
TABLE6_CASES = tuple(
    Case(f"table6/{model}{blocks}:{phase}", topology)
    for phase in ("phase2", "phase1")
    for topology in ("h200:1x1x8", "v5p:4x4x4", "v5e:16x16")
    for model in ("qwen2_5_vl", "minicpm_v")
    for blocks in ("_vr", "")
)


def cases() -> list[Case]:
    """All plans of the page."""
    found = []
    for topology in TOPOLOGIES:
        for variant in VARIANTS:
            found.append(Case(variant, topology, ("--config.mesh.replica=1",)))
            if sizes := SMALLER.get((topology, variant.partition(":")[0])):
                flags = (f"--config.mesh.replica={sizes[0]}", f"--config.mesh.fsdp={sizes[1]}")
                found.append(Case(variant, topology, flags))
    return found


def run(case: Case, workdir: Path, level: str | None) -> str:
    """Plans one case unless its result exists, and returns a line about it."""
    folder = workdir / case.name
    if (folder / "plan.json").exists():
        return "kept"
    command = [sys.executable, "-m", "vr_jax", "plan", f"--config={case.config}"]
    command += [f"--topology={case.topology}", f"--output={folder}", *case.flags]
    # Only the compiler for TPUs takes much longer at its default.
    if level is not None and case.topology.startswith(("v", "tpu")):
        command.append(f"--optimization_level={level}")
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    reason = "" if (folder / "plan.json").exists() else ": " + "".join(done.stderr.strip().splitlines()[-1:])
    if reason:
        write_text(workdir / f"{case.name}.error.txt", reason[2:])
    return f"{time.perf_counter() - began:.0f} s, exit {done.returncode}{reason}"


def row(case: Case, plan: dict[str, Any]) -> list[str]:
    """The cells of a row of the table."""
    memory, work, roof = plan["memory"], plan["work"], plan["roofline"]
    temporaries, peak = memory["temporaries"], memory["peak"]
    cells = [
        case.variant.removeprefix("table6/").replace(":", " ") if "/" in case.variant else _sized(case.variant),
        case.topology,
        " x ".join(str(size) for size in plan["mesh"].values()),
        f"{plan['settings']['rows']}",
        f"{memory['arguments'] / GIB:.2f}",
        "" if temporaries is None else f"{temporaries / GIB:.2f}",
        "" if peak is None else f"{peak / GIB:.2f}",
        # Neither is known of a CPU.
        "" if memory["capacity"] is None else f"{memory['capacity'] / GIB:.1f}",
        {True: "yes", False: "**no**", None: ""}[memory["fits"]],
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


def _sized(variant: str) -> str:
    """The size and phase of a variant as the table shows them, "0.5b phase1"."""
    return variant.replace("_", ".", 1).replace(":", " ")


HEAD = (
    *("config", "topology", "replica x fsdp x tensor", "rows", "state", "temporaries", "peak", "of", "fits"),
    *("TFLOP", "HBM, GB", "sent, GB", "FLOP/s, ms", "HBM, ms", "links, ms", "MFU bound", "minutes", "compiled, s"),
)


def write(chosen: Sequence[Case], workdir: Path, page: Path) -> None:
    """Writes the plans as JSON beside the page, and the table between its two marks in the page."""
    planned, missing = [], []
    for case in chosen:
        file, error = workdir / case.name / "plan.json", workdir / f"{case.name}.error.txt"
        if file.exists():
            planned.append((case, json.loads(file.read_text())[0]))
        else:
            why = error.read_text().strip() if error.exists() else "not run"
            missing.append(f"* {case.variant} on {case.topology} {' '.join(case.flags)}: {why}")
    rule = ["---", "---", "---", *["---:"] * (len(HEAD) - 3)]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, rule, *(row(case, plan) for case, plan in planned))]
    versions = sorted({f"{name} {number}" for _, plan in planned for name, number in plan["versions"].items()})
    levels = {f"{case.topology} {plan['settings']['optimization_level']}" for case, plan in planned}
    others = sorted(level for level in levels if not level.endswith(" default"))
    lines += ["", f"{', '.join(versions)}; optimization level: {', '.join(['default', *others])}."]
    if missing:
        lines += ["", "Not in the table:", "", *missing]
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
    write_text(page.with_suffix(".json"), json.dumps([plan for _, plan in planned], indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--jobs", type=int, default=2, help="plans at a time; each takes about 2 GB (%(default)s)")
    flags.add_argument("--optimization_level", choices=("O0", "O1", "O2", "O3"), help="effort of the TPU's compiler")
    flags.add_argument("--minutes", type=float, default=600, help="minutes after which no further plan is started")
    flags.add_argument(
        "--workdir", type=arguments.path, default=ROOT / "runs" / "pod_plans", help="folder of the plans"
    )
    flags.add_argument(
        "--page", type=arguments.path, help="page with the table (docs/results/plan.md, or docs/results/plan_table6.md)"
    )
    flags.add_argument("--table6", action="store_true", help="the models of the paper's Table 6")
    flags.add_argument("--tiny", action="store_true", help="one plan of configs/demo.py for the CPU")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Plans the cases that are not planned yet and writes the page."""
    options = parser().parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes

    def one(case: Case) -> None:
        if time.monotonic() < until:
            print(case.name, run(case, workdir, options.optimization_level), flush=True)

    chosen = TINY_CASES if options.tiny else TABLE6_CASES if options.table6 else cases()
    page = options.page or ROOT / "docs" / "results" / ("plan_table6.md" if options.table6 else "plan.md")
    workdir = options.workdir.resolve()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, chosen))
    write(chosen, workdir, page)


if __name__ == "__main__":
    main()
