"""Every recorded case of the reference scorers."""

from __future__ import annotations

import json

import pytest

from tests.golden.discovery import ROOT
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.bootstrap import value
from vr_jax.evaluation.interface import PROFILES

APPROXIMATE = {"docvqa", "textvqa"}  # to 1e-6; all other scores are discrete
SCORE_KEYS = {"default": "score", "v0.5": "score_v050"}
AGGREGATE_KEYS = {"default": "aggregate", "v0.5": "aggregate_v050"}
UNLIMITED = 1024  # new tokens of lmms-eval's model classes where a task names no limit
TOKENS_V050 = {"mmmu": 16}  # the recorded settings are those of 0.7.3


def recorded():
    """One parameter per scoring file and profile."""
    found = []
    for path in sorted((ROOT / "scoring").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "benchmark" in document:
            found += [pytest.param(document, profile, id=f"{path.stem}-{profile}") for profile in PROFILES]
    reason = f"no recorded scores under {ROOT / 'scoring'} (set VR_JAX_GOLDEN)"
    return found or [pytest.param(None, None, id="absent", marks=pytest.mark.skip(reason=reason))]


@pytest.mark.parametrize(("document", "profile"), recorded())
def test_scores_prompts_and_aggregates(document, profile):
    name = document["benchmark"]
    benchmark = get_benchmark(name, profile)
    cases = document["cases"]
    items = [benchmark.item(case["id"], case["reference"]) for case in cases]
    predictions = [benchmark.clean(case["prediction"]) for case in cases]
    scores = [benchmark.score(prediction, item) for prediction, item in zip(predictions, items, strict=True)]
    expected = [case.get(SCORE_KEYS[profile], case["score"]) for case in cases]
    tolerance = 1e-6 if name in APPROXIMATE else 0
    wrong = {
        case["id"]: (case["prediction"], case["reference"], found, wanted)
        for case, found, wanted in zip(cases, scores, expected, strict=True)
        # None: the reference draws an option at random.
        if abs(found - (wanted or 0)) > tolerance
    }
    assert not wrong
    drawn = [wanted is None for wanted in expected]
    parsed = [not benchmark.unparsed(prediction, item) for prediction, item in zip(predictions, items, strict=True)]
    assert not any(was_drawn and was_parsed for was_drawn, was_parsed in zip(drawn, parsed, strict=True))
    if name == "mmmu":
        assert drawn == [not was_parsed for was_parsed in parsed]

    kept = [number for number, was_drawn in enumerate(drawn) if not was_drawn]
    aggregate = document.get(AGGREGATE_KEYS[profile], document["aggregate"])
    found = benchmark.aggregate([items[number] for number in kept], [scores[number] for number in kept])
    assert found == pytest.approx(aggregate, abs=1e-12)
    assert set(found) == set(aggregate)
    for entry in document.get("prompts", ()):
        item = benchmark.item("0", entry["reference"])
        assert benchmark.prompt(item) == entry["prompt"]
        if "visual_order" in entry:
            assert benchmark.image_names(item) == entry["visual_order"]
    limit = (document["generation_kwargs"] or {}).get("max_new_tokens", UNLIMITED)
    assert benchmark.max_new_tokens == (TOKENS_V050.get(name, limit) if profile == "v0.5" else limit)


@pytest.mark.parametrize(("document", "profile"), recorded())
def test_estimates_are_the_aggregate_out_of_100(document, profile):
    """Scale of the paper's tables: per cent, MME-Perception / 20, OCRBench / 10."""
    benchmark = get_benchmark(document["benchmark"], profile)
    items = [benchmark.item(case["id"], case["reference"]) for case in document["cases"]]
    scores = [benchmark.score(case["prediction"], item) for case, item in zip(document["cases"], items, strict=True)]
    scale = 1 / 20 if document["benchmark"] == "mme" else 100
    headline = benchmark.aggregate(items, scores)[benchmark.headline]
    estimates = benchmark.estimates(items, scores)
    assert value(estimates.overall) == pytest.approx(scale * headline, abs=1e-3)  # MMMU's is rounded
    assert set(estimates.categories) == {item.category for item in items}
    assert all(0 <= value(strata) <= 100 for strata in estimates.categories.values())
