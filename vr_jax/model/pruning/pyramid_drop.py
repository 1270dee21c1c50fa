"""PyramidDrop (Xing et al., CVPR 2025): fewer and fewer vision tokens, dropped before each layer of a list.

Source: Cooperx521/PyramidDrop `pdrop_forward`, `pdrop_rank_drop`, at inference; methods.md 4.2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import jax.numpy as jnp

from vr_jax.model.batch import Batch
from vr_jax.model.decoders.qwen2 import DecoderInputs
from vr_jax.model.pruning.dropping import (
    StageHook,
    compact,
    counts,
    drop,
    last_token_attention,
    strongest,
    vision_tokens,
)
from vr_jax.model.registry import PromptSize, PrunerConfig, check, check_increasing

if TYPE_CHECKING:
    from vr_jax.model.config import VlmConfig
    from vr_jax.model.vlm import Levels, VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class PyramidDropConfig(PrunerConfig):
    """Kept tokens are renumbered 0, 1, ... after every drop.

    The first drop's ranking uses the weights of the layer it stands before, as all others."""

    name: str = "pyramid_drop"
    # Decoder layers already run at a drop. None: about a twelfth (2, where that leaves room), a quarter and a half.
    layers: tuple[int, ...] | None = None
    # Fractions of the original vision tokens that are left after each drop. None: l, l^2, l^3, ..., with l to three
    # digits, so that the mean over all layers is `budget`.
    ratios: tuple[float, ...] | None = None
    budget: float = 1 / 9  # of no effect where `ratios` are given

    def __post_init__(self):
        owner = "PyramidDropConfig"
        check(0 < self.budget <= 1, f"{owner}.budget = {self.budget}: expected a fraction above 0, at most 1")
        if self.layers is not None:
            check_increasing(owner, "layers", self.layers)
        if self.ratios is not None:
            falling = all(before >= after for before, after in pairwise((1, *self.ratios, 0)))
            check(falling, f"{owner}.ratios = {self.ratios}: expected fractions in 0..1, none above the one before")

    def cuts(self, model: VlmConfig) -> tuple[int, ...]:
        return self.layers or _default_layers(model.decoder.num_layers, self.budget)

    def fractions(self, model: VlmConfig) -> tuple[float, ...]:
        """What is left of the original vision tokens after each of `cuts`."""
        return self.ratios or _powers(self.cuts(model), model.decoder.num_layers, self.budget)

    def check_model(self, model: VlmConfig) -> None:
        layers, depth = self.cuts(model), model.decoder.num_layers
        check(
            all(isinstance(layer, int) and 1 <= layer < depth for layer in layers),
            f"pruning 'pyramid_drop': layers = {layers} do not fit a decoder of {depth} layers; set layers to integers "
            f"in 1..{depth - 1}",
        )
        if self.ratios is None:
            check(
                self.budget * depth >= layers[0],
                f"pruning 'pyramid_drop': the first {layers[0]} of {depth} layers see every token, so the layer "
                f"average cannot fall below {layers[0] / depth:.4g}, budget = {self.budget:.4g}; raise budget, or "
                "set layers that begin earlier",
            )
        fractions = self.fractions(model)
        check(
            len(fractions) == len(layers),
            f"pruning 'pyramid_drop': {len(fractions)} ratios for {len(layers)} layers {layers}; set as many",
        )

    def kept(self, model: VlmConfig, layer: int, prompt: PromptSize) -> int:
        vision = prompt.vision
        for cut, fraction in zip(self.cuts(model), self.fractions(model), strict=True):
            if layer >= cut:
                vision = int(prompt.vision * fraction)
        return prompt.text + vision


def _default_layers(depth: int, budget: float) -> tuple[int, ...]:
    """2, 6, 12 of 24 and 2, 7, 14 of 28. The first is 1 where a first drop at 2 would leave no layer before the second,
    or could not meet the budget."""
    first = 2 if round(depth / 4) > 2 and budget * depth >= 2 else 1
    second = max(first + 1, round(depth / 4))
    return first, second, max(second + 1, round(depth / 2))


@functools.cache
def _powers(layers: Sequence[int], depth: int, budget: float) -> tuple[float, ...]:
    """Powers of the fraction, to three digits, whose mean over the layers is `budget`: 0.133 of 24, 0.169 of 28."""
    lengths = [stop - begin for begin, stop in pairwise((0, *layers, depth))]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        average = sum(length * middle**power for power, length in enumerate(lengths)) / depth
        low, high = (middle, high) if average < budget else (low, middle)
    fraction = float(f"{low:.3g}")
    return tuple(fraction ** (i + 1) for i in range(len(layers)))


def start(
    config: PyramidDropConfig, model: VisionLanguageModel, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None
) -> StageHook:
    """See `pruning.Entry`."""
    vision = vision_tokens(batch)
    total, slots = jnp.sum(vision, axis=1), vision.shape[1]
    fractions = dict(zip(config.cuts(model.config), config.fractions(model.config), strict=True))
    bounds = model.config.decoder_bounds

    def stage_hook(k: int, inputs: DecoderInputs) -> DecoderInputs:
        nonlocal vision
        if bounds[k] in fractions:
            score = last_token_attention(model.decoder, k, inputs)
            kept = strongest(score, vision, counts(lambda n: int(n * fractions[bounds[k]]), total, slots))
            inputs, vision = drop(inputs, ~vision | kept, renumber=True), kept
        inputs, vision = compact((inputs, vision), inputs.segment_ids > 0, lengths[k] if lengths else None)
        return inputs

    return stage_hook
