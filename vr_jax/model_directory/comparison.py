"""Compares the config that stored parameters were made with to the config of the model that takes them.

Parameters of the right shape compute something else under another rotary base or another epsilon, and nothing in the
tensors tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vr_jax.model.config import VlmConfig
from vr_jax.model_directory.layout import PIXELS

# Fields that choose how something is computed, or that act on random initial values only.
_WITHOUT_EFFECT = ("initializer_range", "init", "cross_attention", "kernel")
_PIXEL_FIELDS = ("image_mean", "image_std", "rescale_factor", "resample")


def config_differences(
    stored: Mapping[str, Any], config: VlmConfig, taken: Iterable[str], allowed: Sequence[str] = ()
) -> list[str]:
    """Compares the sections whose parameters are taken.

    Args:
        stored: The sections of a model directory.
        config: The config of the model that takes its parameters.
        taken: Paths of the parameters that are taken.
        allowed: Beginnings of field names that may differ, e.g. "projector.stride" or "refusion".

    Returns:
        One line for each field that differs, with both values.
    """
    tops = {path.split(".")[0] for path in taken}
    sections = [name for name in ("encoder", "decoder", "projector", "refusion") if name in tops]
    ours = config.to_dict()
    pairs: list[tuple[str, Any, Any]] = []
    for name in sections:
        theirs, mine = stored.get(name) or {}, ours[name] or {}
        fields = [field for field in mine if field in theirs and field not in _WITHOUT_EFFECT]
        pairs += [(f"{name}.{field}", theirs[field], mine[field]) for field in fields]
    if "encoder" in tops:
        pixels = stored.get("image") or stored.get(PIXELS) or {}
        pairs += [(f"image.{name}", pixels[name], ours["image"][name]) for name in _PIXEL_FIELDS if name in pixels]
    if "projector" in tops and "vision_feature_layer" in stored:
        pairs.append(("vision_feature_layer", stored["vision_feature_layer"], config.vision_feature_layer))
    return [
        f"{name} = {theirs!r} there, {mine!r} in the config"
        for name, theirs, mine in pairs
        if theirs != mine and not name.startswith(tuple(allowed))
    ]
