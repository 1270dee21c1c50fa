"""`results.json` of a probe: written whole or not at all, read back for the plot, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vr_jax.probe.errors import ProbeError
from vr_jax.probe.taps import Kind
from vr_jax.storage import write_text

RESULTS = "results.json"
FORMAT, VERSION = "vr_jax probe", 1


@dataclass(frozen=True)
class TapResult:
    """accuracies, losses: one per seed, seeds 0, 1, ...; accuracies of all validation images, 0..1."""

    name: str
    kind: Kind
    layer: int | None
    what: str
    tokens: int
    width: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]  # training, last epoch, nats

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class ProbeResult:
    """label: names the model in a plot. settings: everything that decides the numbers, nested. left_out: taps that
    this model does not have, and why. unreadable: images that could not be used, and why."""

    label: str
    settings: Mapping[str, Any]
    taps: tuple[TapResult, ...]
    left_out: Mapping[str, str]
    unreadable: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    run: Mapping[str, Any]  # devices, versions, time

    @property
    def chance(self) -> float:
        return 1 / self.settings["data"]["classes"]

    def to_dict(self) -> dict[str, Any]:
        taps = [asdict(tap) | {"accuracy_mean": tap.mean, "accuracy_spread": tap.spread} for tap in self.taps]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "taps": taps, "chance": self.chance}


def write_results(folder: Path, result: ProbeResult) -> Path:
    path = folder / RESULTS
    write_text(path, json.dumps(result.to_dict(), indent=2) + "\n")
    return path


def read_results(path: Path) -> ProbeResult:
    """path: a results.json, or the folder that holds one. Raises ProbeError for anything else."""
    path = path / RESULTS if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ProbeError(f"{path}: no such file; expected a {RESULTS} of `vr-jax probe`") from None
    except ValueError as error:
        raise ProbeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ProbeError(f"{path} holds no results of `vr-jax probe`")
    if values.get("version") != VERSION:
        raise ProbeError(f"{path} has version {values.get('version')}, this code reads version {VERSION}")
    try:
        taps = tuple(
            TapResult(
                **{name: tap[name] for name in ("name", "kind", "layer", "what", "tokens", "width")},
                accuracies=tuple(map(float, tap["accuracies"])),
                losses=tuple(map(float, tap["losses"])),
            )
            for tap in values["taps"]
        )
        names = ("label", "settings", "left_out", "unreadable", "run")
        result = ProbeResult(**{name: values[name] for name in names}, taps=taps, notes=tuple(values["notes"]))
        result.chance, [tap.mean for tap in taps]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ProbeError(f"{path} is damaged ({type(error).__name__}: {error}); run the probe again") from None
    return result


def table(result: ProbeResult) -> str:
    """The accuracies as text, per cent, mean and spread over the seeds."""
    data = result.settings["data"]
    wide = max(len(tap.name) for tap in result.taps)
    lines = [
        f"{result.label}: {data['classes']} classes, {data['train']} training and {data['val']} validation images",
        f"{'tap':<{wide}}  {'tokens x width':>14}  accuracy",
    ]
    lines += [f"{tap.name:<{wide}}  {f'{tap.tokens} x {tap.width}':>14}  {percent(tap)}" for tap in result.taps]
    lines.append(f"{'chance':<{wide}}  {'':>14}  {100 * result.chance:5.1f} %")
    lines += [f"left out: {name} ({reason})" for name, reason in result.left_out.items()]
    for split, effect in (("train", "are not trained on"), ("val", "count as wrong")):
        if names := result.unreadable[split]:
            first, reason = next(iter(names.items()))
            lines.append(f"{len(names)} {split} image(s) could not be read and {effect}, e.g. {first} ({reason})")
    return "\n".join(lines)


def percent(tap: TapResult) -> str:
    return f"{100 * tap.mean:5.1f}" + (" %" if tap.spread is None else f" ± {100 * tap.spread:.1f} %")
