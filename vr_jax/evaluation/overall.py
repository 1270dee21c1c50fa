"""All benchmarks of an output folder in one summary: the groups and the average of the paper's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from vr_jax.evaluation.interface import GROUPS
from vr_jax.evaluation.run_directory import SUMMARY, differences

Summaries = Mapping[str, Mapping[str, Any]]  # benchmark -> what its summary.json holds
_NORMAL_95 = 1.959964  # half the width of the interval that holds 95 % of a normal distribution


def overall_summary(summaries: Summaries, left_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Scores 0..100 of every benchmark, of each of the paper's groups and the average over the paper's benchmarks.

    A group, and the average, is None until all of its benchmarks are there. Their intervals add the benchmarks'
    standard errors as independent, normal errors. left_out: benchmarks that are not put together with these, and why.
    Source: paper, Tables 1-3; benchmarks.md 0."""
    groups = {group: [name for name in PAPER if BENCHMARKS[name].group == group] for group in GROUPS}
    return {
        "average": _mean(summaries, PAPER),
        "groups": {group: _mean(summaries, names) for group, names in groups.items()},
        "benchmarks": {
            name: {
                key: summary[key]
                for key in ("title", "group", "profile", "score", "interval", "standard_error", "items", "metrics")
            }
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
    """The summaries of finished benchmarks below `output` that the same model answered under the same conditions as
    `like` (a summary), in the order of the registry, as a folder may be filled by several runs; and why others are
    left out."""
    found, left_out = {}, {}
    for name in BENCHMARKS:
        path = output / name / SUMMARY
        try:
            summary = json.loads(path.read_bytes())
            other = differences(_conditions(summary), _conditions(like))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            other = [f"{path.name} cannot be read ({type(error).__name__}: {error}), repeat its command"]
        if other:
            left_out[name] = other[0] + (f", and {len(other) - 1} more" if len(other) > 1 else "")
        else:
            found[name] = summary
    return found, left_out


def _conditions(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for scores to be put together. That of `path` leaves is ignored by `differences`."""
    settings = summary["settings"]
    return {
        **{key: summary[key] for key in ("version", "profile", "asked")},
        **{key: settings[key] for key in ("model", "template")},
        "checkpoint": settings.get("checkpoint"),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The overall summary as lines of text."""
    lines = [f"{'benchmark':<14} {'items':>6} {'score':>7}   95 % interval    metric"]
    for name, one in summary["benchmarks"].items():
        metric = BENCHMARKS[name].headline
        profile = "" if one["profile"] == "default" else f" (profile {one['profile']})"
        lines.append(
            f"{one['title']:<14} {one['items']:>6} {_scored(one)}   {metric} = {one['metrics'][metric]:.5g}{profile}"
        )
    for name, group in {**summary["groups"], "Average": summary["average"]}.items():
        if group is not None:
            lines.append(f"{name:<14} {'':>6} {_scored(group)}")
    for name, one in summary["benchmarks"].items():
        if count := one["unscored"]["count"]:
            reasons = one["unscored"]["by_reason"]
            lines.append(
                f"{one['title']}: {count} items could not be scored and count as wrong: {reasons}; "
                f"they are named in {name}/summary.json"
            )
    lines += [f"{name}: not put together with these: {why}" for name, why in summary["left_out"].items()]
    return "\n".join(lines)


def _scored(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['score']:>7.2f}   [{low:5.2f}, {high:5.2f}]"
