"""The benchmarks, by name. A new one is one file here and one line below."""

from __future__ import annotations

from vr_jax.evaluation.benchmarks.chartqa import ChartQA
from vr_jax.evaluation.benchmarks.demo import DemoHeldOut
from vr_jax.evaluation.types import PROFILES, Benchmark, EvaluationError

BENCHMARKS: dict[str, type[Benchmark]] = {
    "chartqa": ChartQA,
    "demo": DemoHeldOut,
}
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.group)  # those of the paper's average


def get_benchmark(name: str, profile: str = "default") -> Benchmark:
    """Raises EvaluationError for an unknown benchmark or profile, listing the known ones."""
    if name not in BENCHMARKS:
        raise EvaluationError(f"unknown benchmark {name!r}; known: {', '.join(sorted(BENCHMARKS))}")
    if profile not in PROFILES:
        raise EvaluationError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    return BENCHMARKS[name](profile)
