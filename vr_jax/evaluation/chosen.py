"""The benchmarks that the settings of an evaluation choose: published ones by name, and files of one's own."""

from __future__ import annotations

from vr_jax.effects import check_effects
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER, get_benchmark
from vr_jax.evaluation.benchmarks.own import OwnQuestions, is_own, named_own
from vr_jax.evaluation.interface import Benchmark
from vr_jax.evaluation.run_directory import SUMMARY
from vr_jax.settings import EvaluationSettings

ALL = "all"
REPORT = "report.html"


def benchmark_names(text: str) -> tuple[str, ...]:
    """Splits a choice of benchmarks at its commas; "all" is those of the paper, NAME=FILE:METRIC a file of one's own.

    Raises:
        UserError: There is no name, or a name occurs twice.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    names = tuple(one for name in given for one in (PAPER if name == ALL else (name,)))
    if not names:
        raise UserError(f"benchmark is empty: expected names, separated by commas, or {ALL}")
    if len(set(names)) < len(names):
        raise UserError(f"benchmark = {text!r}: expected different names, separated by commas")
    return names


def chosen_benchmarks(settings: EvaluationSettings) -> list[Benchmark]:
    """Returns the benchmarks of an evaluation.

    Raises:
        UserError: A name, a file or a metric cannot be used, two names are equal, or a setting has no effect on the
            benchmarks.
    """
    check_effects(settings, "")
    reserved = dict.fromkeys((*BENCHMARKS, ALL, SUMMARY, REPORT))
    images = {"images": settings.images, "follow_links": settings.follow_links}
    found: list[Benchmark] = [
        named_own(text, reserved, **images) if is_own(text) else get_benchmark(text, settings.profile)
        for text in benchmark_names(settings.benchmark or "")
    ]
    names = [one.name.lower() for one in found]  # some disks do not tell upper from lower case
    if len(set(names)) < len(names):
        raise UserError(f"benchmark = {settings.benchmark!r}: expected different names, separated by commas")
    own = [one.name for one in found if isinstance(one, OwnQuestions)]
    if own and settings.profile != "default":
        raise UserError(
            f"profile = {settings.profile!r} changes the rules of published benchmarks only; score {own[0]} by a "
            "command of its own, without --profile"
        )
    if settings.split is not None and len(found) > 1:
        raise UserError(
            f"split = {settings.split!r} with {len(found)} benchmarks: choose a split for one benchmark only"
        )
    return found
