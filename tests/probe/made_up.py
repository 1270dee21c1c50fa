"""Made-up results of a probe, for the tests of results and figures."""

from __future__ import annotations

from vr_jax.probe import ProbeResult, TapResult


def tap(name: str, kind: str, layer: int | None = None, accuracies: tuple[float, ...] = (0.5, 0.6)) -> TapResult:
    """The results at one tap, with two seeds."""
    return TapResult(name, kind, layer, name, 9, 16, accuracies, (1.0, 1.1))


def made_up_result(label: str, *, refusion: bool) -> ProbeResult:
    """The result of a model with or without a re-fusion block after layer 1."""
    taps = [tap("encoder", "encoder"), tap("compressor", "compressor"), tap("projector", "projector")]
    taps.append(tap("layer 1", "layer", 1))
    if refusion:
        taps.append(tap("layer 1 + vision_remember", "refusion", 1, (0.7, 0.9)))
    taps += [tap("layer 4", "layer", 4), tap("layer 12", "layer", 12)]
    data = {"classes": 4, "train": 8, "val": 10, "path": label}
    settings = {"data": data, "heads": {"lr": 1e-3}}
    return ProbeResult(label, settings, tuple(taps), {"x": "not there"}, {"train": {}, "val": {"a": "b"}}, (), {})
