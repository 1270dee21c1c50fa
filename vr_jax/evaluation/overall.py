"""The overall summary of an output folder: its benchmarks, and the groups and the average of the paper's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from vr_jax.evaluation.interface import GROUPS
from vr_jax.evaluation.run_directory import SUMMARY, differences
from vr_jax.storage import Path, in_order

Summaries = Mapping[str, Mapping[str, Any]]  # The content of each benchmark's summary.json, by name.
_WIDTH = 14  # The smallest width of the column of names in a terminal.
_NORMAL_95 = 1.959964  # 95 % of a normal distribution lie within so many standard deviations of its mean.


def overall_summary(summaries: Summaries, left_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Combines the summaries of benchmarks.

    A group, and the average over the paper's benchmarks, is None until all of its benchmarks are there. Its interval
    combines the standard errors of the benchmarks as independent, normally distributed errors.

    Args:
        summaries: The summaries of the benchmarks, by name.
        left_out: The reasons why other benchmarks in the folder are not combined with these, by name.

    Returns:
        The overall summary, whose scores are 0 to 100.

    Source: paper, Tables 1 to 3; docs/design/benchmarks.md#paper-average.
    """
    groups = {group: [name for name in PAPER if BENCHMARKS[name].group == group] for group in GROUPS}
    return {
        "average": _mean(summaries, PAPER),
        "groups": {group: _mean(summaries, names) for group, names in groups.items()},
        "benchmarks": {
            name: {
                key: summary[key]
                for key in ("title", "group", "profile", "score", "interval", "standard_error", "items", "metrics")
            }
            | {"headline": summary.get("headline") or BENCHMARKS[name].headline}
            | {"categories": summary["categories"]}
            | {"unscored": {key: summary["unscored"][key] for key in ("count", "by_reason")}}
            for name, summary in summaries.items()
        },
        "missing": [name for name in PAPER if name not in summaries],
        "left_out": dict(left_out or {}),
    }


def _mean(summaries: Summaries, names: Sequence[str]) -> dict[str, Any] | None:
    if not names or any(name not in summaries for name in names):
        return None
    score = sum(summaries[name]["score"] for name in names) / len(names)
    error = math.hypot(*(summaries[name]["standard_error"] for name in names)) / len(names)
    interval = [score - _NORMAL_95 * error, score + _NORMAL_95 * error]
    return {"score": score, "interval": interval, "standard_error": error, "benchmarks": list(names)}


def finished(output: Path, like: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Reads the summaries of the benchmarks in an output folder, which several evaluations may have filled.

    Args:
        output: The output folder.
        like: A summary of the present evaluation.

    Returns:
        The summaries whose model and conditions are those of `like`, by name, and the reasons why others are left out.
    """
    found, left_out = {}, {}
    for name in (*BENCHMARKS, *_own_names(output)):
        path = output / name / SUMMARY
        try:
            summary = json.loads(path.read_bytes())
            other = differences(_conditions(summary), _conditions(like))
            if summary["score"] is None:
                other = ["the split has no reference answers, and so no score"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            other = [f"{path.name} cannot be read ({type(error).__name__}: {error}); repeat its evaluation"]
        if other:
            left_out[name] = other[0] + (f", and {len(other) - 1} more" if len(other) > 1 else "")
        else:
            found[name] = summary
    return found, left_out


def _own_names(output: Path) -> list[str]:
    """Returns the names of the benchmarks in an output folder that are files of one's own."""
    names = []
    for path in in_order(output.glob(f"*/{SUMMARY}")):
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        name = path.parent.name
        if name not in BENCHMARKS and isinstance(found, dict) and found.get("benchmark") == name:
            names.append(name)
    return names


def _conditions(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that must agree for scores to be combined; `differences` ignores the key `path`."""
    settings = summary["settings"]
    return {
        **{key: summary[key] for key in ("version", "profile", "asked")},
        **{key: settings[key] for key in ("model", "template")},
        "checkpoint": settings.get("checkpoint"),
    }


def score_table(summary: Mapping[str, Any]) -> str:
    """Writes an overall summary as lines of text, for a terminal."""
    width = max([_WIDTH, *(len(one["title"]) for one in summary["benchmarks"].values())])
    lines = [f"{'benchmark':<{width}} {'items':>6} {'score':>7}   95 % interval    metric"]
    for name, one in summary["benchmarks"].items():
        metric = one.get("headline") or BENCHMARKS[name].headline
        profile = "" if one["profile"] == "default" else f" (profile {one['profile']})"
        scored = f"{one['title']:<{width}} {one['items']:>6} {_scored(one)}"
        lines.append(f"{scored}   {metric} = {one['metrics'][metric]:.5g}{profile}")
    for name, group in {**summary["groups"], "Average": summary["average"]}.items():
        if group is not None:
            lines.append(f"{name:<{width}} {'':>6} {_scored(group)}")
    for name, one in summary["benchmarks"].items():
        if count := one["unscored"]["count"]:
            reasons = one["unscored"]["by_reason"]
            lines.append(
                f"{one['title']}: {count} items could not be scored and count as wrong: {reasons}; "
                f"{name}/summary.json names them"
            )
    lines += [
        f"{name}: its earlier result is not combined with these: {why}" for name, why in summary["left_out"].items()
    ]
    return "\n".join(lines)


def _scored(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['score']:>7.2f}   [{low:5.2f}, {high:5.2f}]"
