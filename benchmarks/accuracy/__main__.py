"""Runs the paper's comparison in miniature with one command.

    python -m benchmarks.accuracy                    two CPU cores, about two hours
    python -m benchmarks.accuracy --setting h200     one NVIDIA H200

It trains the encoder and the uncompressed model, and then every system of the paper's tables from every seed. The work
directory keeps each finished run as a line of runs.jsonl, so the same command continues where it was stopped. At the
end it gets the tables (tables.md) and the plot (ratios.svg).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import arguments

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Trains what is not finished yet and writes the tables; returns 1 after a mistake in the flags or the files."""
    options = parser().parse_args(arguments)
    if options.setting != "h200":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported late: the backend reads the environment.
    import jax

    from benchmarks.accuracy import report, results
    from benchmarks.accuracy.comparison import pending, run_systems
    from benchmarks.accuracy.preparation import prepare
    from benchmarks.accuracy.settings import SETTINGS

    setting = SETTINGS[options.setting]
    workdir = options.workdir or ROOT / "runs" / f"accuracy_{setting.name}"
    runs = workdir / "runs.jsonl"

    # Seeds of a system, and the next time, share compilations.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilations"))

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    try:
        if not options.report:
            jobs = pending(setting, results.read(runs), options.seeds, options.systems)
            prepared = prepare(setting, workdir, log)
            if options.jobs > 1:
                del prepared  # every process loads its own
                _in_processes(options, workdir)
            else:
                part, parts = options.part
                # Not every N-th: rows with and without Vision Remember alternate, and cost differently.
                share = [job for i, job in enumerate(jobs) if (i + i // parts) % parts == part]
                run_systems(setting, prepared, share, runs, log)
        if options.part == (0, 1):
            finished = results.read(runs)
            (workdir / "tables.md").write_text(report.tables(setting, finished))
            report.plot(setting, finished, workdir / "ratios.svg")
            print((workdir / "tables.md").read_text())
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--setting", choices=("cpu", "h200", "toy"), default="cpu")
    flags.add_argument("--workdir", type=arguments.path, help="default: runs/accuracy_SETTING")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--systems", nargs="+", default=["*"], metavar="TABLE/ROW", help="patterns; default: all")
    flags.add_argument("--jobs", type=int, default=1, help="systems trained at once, each on one core")
    flags.add_argument(
        "--part", type=_part, default=(0, 1), metavar="K/N", help="only every N-th system, from the K-th"
    )
    flags.add_argument("--report", action="store_true", help="train nothing, only write tables and plot")
    return flags


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with 0 <= K < N")
    return int(part), int(parts)


def _in_processes(options: argparse.Namespace, workdir: Path) -> None:
    """Trains in several processes, because the small steps of one do not fill several cores."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    command = [sys.executable, "-m", "benchmarks.accuracy", f"--setting={options.setting}", f"--workdir={workdir}"]
    command += ["--seeds", *map(str, options.seeds), "--systems", *options.systems]
    processes = [
        subprocess.Popen([*command, "--part", f"{part}/{options.jobs}"], env={**os.environ, "XLA_FLAGS": flags})
        for part in range(options.jobs)
    ]
    failed = [process.pid for process in processes if process.wait() != 0]
    if failed:
        raise ValueError(f"{len(failed)} of {options.jobs} processes failed, see above; run again to go on")


if __name__ == "__main__":
    sys.exit(main())
