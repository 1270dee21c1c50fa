"""The benchmarks, by name. A new one is one file here and one line below."""

from __future__ import annotations

import difflib

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
from vr_jax.evaluation.types import PROFILES, Benchmark, EvaluationError

BENCHMARKS: dict[str, type[Benchmark]] = {  # in the order of the paper's tables
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
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.group)  # those of the paper's average


def get_benchmark(name: str, profile: str = "default") -> Benchmark:
    """Raises EvaluationError for an unknown benchmark or profile, listing the known ones."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EvaluationError(f"unknown benchmark {name!r}; {hint}known: {', '.join(sorted(BENCHMARKS))}")
    if profile not in PROFILES:
        raise EvaluationError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    return BENCHMARKS[name](profile)
