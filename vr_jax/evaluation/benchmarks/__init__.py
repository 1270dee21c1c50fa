"""The benchmarks by name. A new benchmark is one module of this package and one line of the table below."""

from __future__ import annotations

import difflib

from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks.ai2d import AI2D
from vr_jax.evaluation.benchmarks.chartqa import ChartQA
from vr_jax.evaluation.benchmarks.demo import DemoHeldOut
from vr_jax.evaluation.benchmarks.docvqa import DocVQA
from vr_jax.evaluation.benchmarks.gqa import GQA
from vr_jax.evaluation.benchmarks.mme import MME
from vr_jax.evaluation.benchmarks.mmmu import MMMU
from vr_jax.evaluation.benchmarks.mmstar import MMStar
from vr_jax.evaluation.benchmarks.ocrbench import OCRBench
from vr_jax.evaluation.benchmarks.realworldqa import RealWorldQA
from vr_jax.evaluation.benchmarks.scienceqa import ScienceQA
from vr_jax.evaluation.benchmarks.textvqa import TextVQA
from vr_jax.evaluation.interface import PROFILES, Benchmark

# The order is that of the paper's tables.
BENCHMARKS: dict[str, type[Benchmark]] = {
    "gqa": GQA,
    "mme": MME,
    "realworldqa": RealWorldQA,
    "scienceqa": ScienceQA,
    "ai2d": AI2D,
    "mmmu": MMMU,
    "mmstar": MMStar,
    "chartqa": ChartQA,
    "docvqa": DocVQA,
    "textvqa": TextVQA,
    "ocrbench": OCRBench,
    "demo": DemoHeldOut,
}
# The paper's average is over the benchmarks that belong to one of its groups.
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.group)


def get_benchmark(name: str, profile: str = "default") -> Benchmark:
    """Returns a benchmark.

    Args:
        name: A key of `BENCHMARKS`.
        profile: A scoring profile, one of `PROFILES`.

    Raises:
        UserError: The benchmark or the profile is unknown. The message lists the known ones.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown benchmark {name!r}; {hint}known: {', '.join(sorted(BENCHMARKS))}")
    for known in PROFILES:
        if known == profile:
            return BENCHMARKS[name](known)
    raise UserError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
