"""Every recorded case of the reference scorers; benchmarks that vr_jax does not score yet are skipped by name."""

from __future__ import annotations

import json

import pytest

from tests.golden.discovery import ROOT
from vr_jax.evaluation.benchmarks import BENCHMARKS, get_benchmark
from vr_jax.evaluation.types import PROFILES

EXACT = {"chartqa"}  # discrete metrics; averages and ANLS to 1e-6
SCORE_KEYS = {"default": "score", "v0.5": "score_v050"}
AGGREGATE_KEYS = {"default": "aggregate", "v0.5": "aggregate_v050"}


def recorded():
    """One parameter per scoring file and profile."""
    found = []
    for path in sorted((ROOT / "scoring").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        name = document.get("benchmark")
        if name is None:
            continue
        unknown = name not in BENCHMARKS
        marks = [pytest.mark.skip(reason=f"benchmark {name!r} is not part of vr_jax yet")] if unknown else []
        found += [pytest.param(document, profile, id=f"{path.stem}-{profile}", marks=marks) for profile in PROFILES]
    reason = f"no recorded scores under {ROOT / 'scoring'} (set VR_JAX_GOLDEN)"
    return found or [pytest.param(None, None, id="absent", marks=pytest.mark.skip(reason=reason))]


@pytest.mark.parametrize(("document", "profile"), recorded())
def test_scores_prompts_and_aggregates(document, profile):
    benchmark = get_benchmark(document["benchmark"], profile)
    items = [benchmark.item(case["id"], case["reference"]) for case in document["cases"]]
    scores = [
        benchmark.score(benchmark.clean(case["prediction"]), item)
        for case, item in zip(document["cases"], items, strict=True)
    ]
    expected = [case.get(SCORE_KEYS[profile], case["score"]) for case in document["cases"]]
    tolerance = 0 if document["benchmark"] in EXACT else 1e-6
    wrong = {
        case["id"]: (case["prediction"], case["reference"], found, wanted)
        for case, found, wanted in zip(document["cases"], scores, expected, strict=True)
        if abs(found - wanted) > tolerance
    }
    assert not wrong

    aggregate = document.get(AGGREGATE_KEYS[profile], document["aggregate"])
    assert benchmark.aggregate(items, scores) == pytest.approx(aggregate, abs=1e-12)
    for entry in document.get("prompts", ()):
        assert benchmark.prompt(benchmark.item("0", entry["reference"])) == entry["prompt"]
    assert benchmark.max_new_tokens == document["generation_kwargs"]["max_new_tokens"]
