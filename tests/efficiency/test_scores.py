"""Accuracies are read from numbers and summaries, by name or in order."""

import json

import pytest

from vr_jax.efficiency import parse_scores
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from vr_jax.evaluation.overall import overall_summary


def one_summary(name):
    """The fields of a benchmark's summary.json that the overall summary reads."""
    fields = {"title": name, "group": BENCHMARKS[name].group, "profile": "default", "interval": [0.0, 100.0]}
    fields |= {"score": 40.0 + PAPER.index(name), "standard_error": 1.0, "items": 4, "metrics": {}, "categories": {}}
    return fields | {"unscored": {"count": 0, "by_reason": {}}}


def test_one_score_for_each_system(tmp_path):
    summary, average, part, empty = (tmp_path / f"{name}.json" for name in ("summary", "average", "part", "empty"))
    summary.write_text('{"score": 30.5, "items": 7}')
    average.write_text(json.dumps(overall_summary({name: one_summary(name) for name in PAPER})))
    part.write_text(json.dumps(overall_summary({name: one_summary(name) for name in PAPER[2:]})))
    empty.write_text('{"score": "high"}')
    names = ["a", "b=c"]
    assert parse_scores([], names) == [None, None]
    assert parse_scores(["1", "2.5"], names) == [1.0, 2.5]
    assert parse_scores([f"b=c={summary}", "a=7"], names) == [7.0, 30.5]
    assert parse_scores([str(average), "0"], names) == [pytest.approx(45.0), 0.0], "40 .. 50, their mean"
    for texts, message in (
        (["1"], "1 scores are given for 2 systems"),
        (["a=1"], "every system needs one score, but b=c has 0"),
        (["a=1", "a=2", "b=c=3"], "a has 2"),
        (["a=1", "2"], "give all 2 scores with a name, or all in the order"),
        (["x=1", "b=c=2"], "no system has this name; the names are a, b=c"),
        (["1", "101"], "is not a score from 0 to 100"),
        (["1", "nan"], "is not a score from 0 to 100"),
        (["1", "nowhere.json"], "this is neither a number nor a file"),
        (["1", str(empty)], r"expected the summary\.json of `vr-jax eval`, with a score or an average"),
        (
            ["1", str(part)],
            rf"no average, because benchmarks are missing \({PAPER[0]}, {PAPER[1]}\); run them, or give",
        ),
    ):
        with pytest.raises(UserError, match=message):
            parse_scores(texts, names)
