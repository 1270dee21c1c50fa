"""The results of a probe: `results.json`, and their table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from vr_jax.errors import UserError
from vr_jax.probe.taps import Kind
from vr_jax.storage import Path, write_json

RESULTS = "results.json"
FORMAT, VERSION = "vr_jax probe", 2


@dataclass(frozen=True)
class TapResult:
    """The results at one tap, with one number per seed (seeds 0, 1, ...).

    Attributes:
        name: The name of the tap.
        kind: The part of the model.
        layer: The decoder layer, counted from 1, or None before the decoder.
        description: A phrase that states which tokens are tapped.
        tokens: The number of tokens.
        width: The width of a token.
        accuracies: The fractions of all validation images that are classified correctly.
        losses: The mean cross-entropies in the last epoch of the training, in nats.
    """

    name: str
    kind: Kind
    layer: int | None
    description: str
    tokens: int
    width: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the accuracy over the seeds, or None for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class ProbeResult:
    """The results of a probe.

    Attributes:
        label: The name of the model in a plot.
        settings: Everything that decides the numbers, as nested dictionaries.
        taps: The results at each tap, in the order of the forward pass.
        left_out: The taps that this model does not have, each with the reason.
        unreadable: The images of each split that could not be read, each with the reason.
        notes: Remarks on what was measured.
        run: The devices, versions and duration.
    """

    label: str
    settings: Mapping[str, Any]
    taps: tuple[TapResult, ...]
    left_out: Mapping[str, str]
    unreadable: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    run: Mapping[str, Any]

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.settings["data"]["classes"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of `results.json`."""
        taps = [asdict(tap) | {"accuracy_mean": tap.mean, "accuracy_deviation": tap.deviation} for tap in self.taps]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "taps": taps, "chance": self.chance}


def write_results(folder: Path, result: ProbeResult) -> Path:
    """Writes `results.json`, whole or not at all, and returns its path."""
    path = folder / RESULTS
    write_json(path, result.to_dict())
    return path


def read_results(path: Path) -> ProbeResult:
    """Reads the results of a probe.

    Args:
        path: A `results.json`, or the folder that contains one.

    Raises:
        UserError: The file does not exist or has other contents.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected the {RESULTS} of `vr-jax probe`.") from None
    except ValueError as error:
        raise UserError(f"{path}: the file is not JSON ({error}); run the probe again.") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: the file does not contain results of `vr-jax probe`.")
    if values.get("version") != VERSION:
        raise UserError(
            f"{path}: the results have the format version {values.get('version')}, but this program reads version "
            f"{VERSION}; run the probe again."
        )
    try:
        taps = tuple(
            TapResult(
                **{name: tap[name] for name in ("name", "kind", "layer", "description", "tokens", "width")},
                accuracies=tuple(map(float, tap["accuracies"])),
                losses=tuple(map(float, tap["losses"])),
            )
            for tap in values["taps"]
        )
        names = ("label", "settings", "left_out", "unreadable", "run")
        result = ProbeResult(**{name: values[name] for name in names}, taps=taps, notes=tuple(values["notes"]))
        # Reading these properties finds numbers that are missing.
        _ = result.chance, [tap.mean for tap in taps]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        problem = f"the file is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {problem}; run the probe again.") from None
    return result


def table(result: ProbeResult) -> str:
    """Formats the accuracies as a table: per cent, mean and standard deviation over the seeds."""
    data = result.settings["data"]
    wide = max(len(tap.name) for tap in result.taps)
    lines = [
        f"{result.label}: {data['classes']} classes, {data['train']} training and {data['val']} validation images",
        f"{'tap':<{wide}}  {'tokens x width':>14}  accuracy",
    ]
    lines += [f"{tap.name:<{wide}}  {f'{tap.tokens} x {tap.width}':>14}  {_percent(tap)}" for tap in result.taps]
    lines.append(f"{'chance':<{wide}}  {'':>14}  {100 * result.chance:5.1f} %")
    lines += [f"left out: {name} ({reason})" for name, reason in result.left_out.items()]
    for split, effect in (("train", "are not used"), ("val", "count as wrong")):
        if names := result.unreadable[split]:
            first, reason = next(iter(names.items()))
            lines.append(f"{len(names)} {split} image(s) could not be read and {effect}, e.g. {first} ({reason})")
    return "\n".join(lines)


def _percent(tap: TapResult) -> str:
    return f"{100 * tap.mean:5.1f}" + (" %" if tap.deviation is None else f" ± {100 * tap.deviation:.1f} %")
