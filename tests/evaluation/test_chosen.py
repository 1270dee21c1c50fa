"""The choice of benchmarks: names, files of one's own with their metrics, and what cannot be chosen together."""

from __future__ import annotations

from pathlib import Path

import pytest

from vr_jax.errors import UserError
from vr_jax.evaluation import METRICS, PAPER, OwnQuestions, benchmark_names, chosen_benchmarks, own_benchmark
from vr_jax.settings import EvaluationSettings


def chosen(benchmark, **settings):
    return chosen_benchmarks(EvaluationSettings(benchmark=benchmark, **settings))


def test_names_are_separated_by_commas():
    assert benchmark_names(" gqa,chartqa ,") == ("gqa", "chartqa")
    assert benchmark_names("mine=a.jsonl:anls,gqa") == ("mine=a.jsonl:anls", "gqa")


def test_all_names_the_eleven_benchmarks_of_the_paper():
    assert benchmark_names("all") == PAPER
    assert len(PAPER) == 11
    assert benchmark_names("mine=a.jsonl,all") == ("mine=a.jsonl", *PAPER)


def test_no_names_and_repeated_names_are_refused():
    with pytest.raises(UserError, match="benchmark is empty"):
        benchmark_names(" ,")
    for wrong in ("gqa,gqa", "all,gqa,all", "all,gqa"):
        with pytest.raises(UserError, match="expected different names, separated by commas"):
            benchmark_names(wrong)


def test_own_files_stand_beside_published_benchmarks():
    mine, chartqa, other = chosen("mine=~/a b.jsonl : anls,chartqa,other=c:/d.json:exact", images="/images")
    assert isinstance(mine, OwnQuestions)
    assert (mine.name, mine.title, mine.headline) == ("mine", "mine", "anls")
    assert mine.path == Path.home() / "a b.jsonl"
    assert (mine.images, mine.follow_links) == (Path("/images"), False)
    assert chartqa.name == "chartqa"
    assert (other.path, other.headline) == (Path("c:/d.json"), "exact")


def test_a_file_without_a_metric_is_scored_by_exact_match():
    (mine,) = chosen("mine=a.jsonl", follow_links=True)
    assert (mine.path, mine.headline, mine.follow_links) == (Path("a.jsonl"), "exact", True)
    assert mine == own_benchmark("mine", "a.jsonl", follow_links=True)


@pytest.mark.parametrize(
    ("benchmark", "settings", "message"),
    [
        ("mine=a.jsonl:anlss", {}, f"unknown metric 'anlss'; did you mean anls.*{', '.join(METRICS)}"),
        ("mine=a:b.jsonl", {}, "unknown metric 'b.jsonl'"),
        ("mine=", {}, "expected NAME=FILE or NAME=FILE:METRIC"),
        ("=a.jsonl", {}, "expected NAME=FILE or NAME=FILE:METRIC"),
        ("mine=a.jsonl:", {}, "expected NAME=FILE or NAME=FILE:METRIC"),
        ("mine=:exact", {}, "expected NAME=FILE or NAME=FILE:METRIC"),
        ("ChartQA=a.jsonl", {}, "ChartQA is the name of another benchmark"),
        ("all=a.jsonl", {}, "all is the name of another benchmark"),
        ("summary.json=a.jsonl", {}, "summary.json is the name of another benchmark"),
        ("../up=a.jsonl", {}, "benchmark '../up': expected a name of at most 64 letters"),
        (".hidden=a.jsonl", {}, "benchmark '.hidden': expected a name"),
        ("mine=a.jsonl,Mine=b.jsonl", {}, "expected different names"),
        ("mine=ftp://host/a.jsonl:exact", {}, "benchmark mine = ftp://host/a.jsonl: an address of the kind ftp:"),
        ("mine=a.jsonl,gqa", {"profile": "v0.5"}, "profile = 'v0.5' changes the rules of published benchmarks only"),
        ("mine=a.jsonl", {"profile": "v0.5"}, "profile = 'v0.5' changes the rules of published benchmarks only"),
        ("mine=a.jsonl,gqa", {"split": "val"}, "split = 'val' with 2 benchmarks"),
        ("mine=a.jsonl", {"split": "val"}, "split = 'val' has no effect with benchmark = 'mine=a.jsonl'"),
        ("mine=a.jsonl", {"data": "folder"}, "data = 'folder' has no effect with benchmark = 'mine=a.jsonl'"),
        ("gqa", {"images": "folder"}, "images = 'folder' has no effect with benchmark = 'gqa'"),
        ("gqa", {"follow_links": True}, "follow_links = True has no effect with benchmark = 'gqa'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(benchmark, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        chosen(benchmark, **settings)
    assert "\n" not in str(caught.value)


def test_an_own_benchmark_checks_its_arguments():
    with pytest.raises(UserError, match="limit = 0: expected at least 1"):
        own_benchmark("mine", "a.jsonl", limit=0)
    with pytest.raises(UserError, match="images = ftp://a/b: an address of the kind ftp:// cannot be read"):
        own_benchmark("mine", "a.jsonl", images="ftp://a/b")
    for field in ("data", "split"):
        with pytest.raises(UserError, match=f"{field} = x: mine is the file a.jsonl"):
            own_benchmark("mine", "a.jsonl").items(**{field: "x"})
