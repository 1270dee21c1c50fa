"""All benchmarks in one summary: the paper's groups and average, and what may be put together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from vr_jax.evaluation.overall import finished, overall_summary, score_table

GROUPS = {
    "General": ["gqa", "mme", "realworldqa"],
    "Knowledge": ["scienceqa", "ai2d", "mmmu", "mmstar"],
    "OCR&Chart": ["chartqa", "docvqa", "textvqa", "ocrbench"],
}
SCORES = {"General": 55.2, "Knowledge": 43.4, "OCR&Chart": 40.4}  # the paper's baseline, Table 1: average 45.5


def summary(name, score, error=0.6, **changes):
    benchmark = BENCHMARKS[name]
    return {
        "version": 2,
        "title": benchmark.title,
        "group": benchmark.group,
        "profile": "default",
        "asked": {"limit": None, "split": None, "max_new_tokens": None},
        "score": score,
        "interval": [score - 1, score + 1],
        "standard_error": error,
        "items": 10,
        "metrics": {benchmark.headline: score / 100},
        "categories": {},
        "unscored": {"count": 0, "by_reason": {}, "items": {}},
        "settings": {"model": {"dtype": "float32"}, "template": "qwen_1_5", "checkpoint": {"path": "a", "sha256": "1"}},
    } | changes


@pytest.fixture
def summaries():
    return {
        name: summary(name, SCORES[group] + k - 1) for group, names in GROUPS.items() for k, name in enumerate(names)
    }


def test_groups_and_average_are_the_papers(summaries):
    assert {name for names in GROUPS.values() for name in names} == set(PAPER)
    for group, names in GROUPS.items():
        summaries[names[-1]]["score"] -= sum(summaries[name]["score"] - SCORES[group] for name in names)
    found = overall_summary(summaries)
    assert {group: one["score"] for group, one in found["groups"].items()} == pytest.approx(SCORES)
    assert found["average"]["score"] == pytest.approx(45.5, abs=0.05)
    assert found["missing"] == []
    assert {group: set(one["benchmarks"]) for group, one in found["groups"].items()} == {
        group: set(names) for group, names in GROUPS.items()
    }
    assert "Average" in score_table(found)


def test_intervals_of_means_add_independent_errors(summaries):
    rng = np.random.default_rng(0)
    drawn = np.mean([rng.normal(one["score"], one["standard_error"], 200_000) for one in summaries.values()], axis=0)
    low, high = overall_summary(summaries)["average"]["interval"]
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.01)


def test_an_incomplete_group_has_no_score(summaries):
    del summaries["mme"]
    found = overall_summary(summaries)
    assert found["average"] is None
    assert found["groups"]["General"] is None
    assert found["groups"]["Knowledge"]["score"] == pytest.approx(43.9)
    assert found["missing"] == ["mme"]
    text = score_table(found)
    assert "General" not in text
    assert "Knowledge" in text


def test_what_could_not_be_scored_is_told(summaries):
    summaries["gqa"]["unscored"] = {"count": 2, "by_reason": {"broken_image": 2}, "items": {}}
    text = score_table(overall_summary(summaries))
    assert "GQA: 2 items could not be scored and count as wrong: {'broken_image': 2}" in text


def test_a_folder_is_put_together_from_runs_of_one_model(summaries, tmp_path):
    def write(name, one):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(one if isinstance(one, str) else json.dumps(one))

    like = summaries["chartqa"]
    write("chartqa", like)
    moved = like["settings"] | {"checkpoint": {"path": "elsewhere", "sha256": "1"}}
    write("gqa", summaries["gqa"] | {"settings": moved})
    other = like["settings"] | {"checkpoint": {"path": "a", "sha256": "2"}}
    write("mme", summaries["mme"] | {"settings": other})
    write("docvqa", summaries["docvqa"] | {"profile": "v0.5"})
    write("textvqa", "{")
    write("ai2d", summaries["ai2d"] | {"asked": like["asked"] | {"limit": 2}})
    write("notes", "not a benchmark")
    found, left_out = finished(tmp_path, like)
    assert list(found) == ["gqa", "chartqa"]
    assert left_out == {
        "mme": "checkpoint: the content differs",
        "docvqa": "profile: 'v0.5' there, 'default' now",
        "textvqa": left_out["textvqa"],
        "ai2d": "asked.limit: 2 there, None now",
    }
    assert "summary.json cannot be read (JSONDecodeError" in left_out["textvqa"]
    text = score_table(overall_summary(found, left_out))
    assert "mme: its earlier result is not combined with these: checkpoint: the content differs" in text
