"""`pyramid_drop` keeps fewer and fewer vision tokens, dropping before each layer of a list (Xing et al., CVPR 2025).

Source: Cooperx521/PyramidDrop (`pdrop_forward`, `pdrop_rank_drop`, at inference); docs/design/methods.md#pyramid-drop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from vr_jax.fields import Fraction, NoEffect, PositiveFraction, PositiveInt, check, check_increasing
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.pruning.dropping import compact, counts, drop, row_length, strongest, vision_tokens
from vr_jax.model.registry import ForwardPass, PrunerConfig
from vr_jax.model.spec import ModelSpec, PromptSize


@dataclass(frozen=True, kw_only=True)
class PyramidDropConfig(PrunerConfig, name="pyramid_drop"):
    """PyramidDrop. Kept tokens are renumbered 0, 1, ... after every drop.

    Every drop ranks tokens with the weights of the layer that it stands before.

    Attributes:
        layers: Numbers of decoder layers that have run at the drops, or None for about a twelfth (2, where that leaves
            room), a quarter and a half of them.
        ratios: Fractions of the original vision tokens that are left after each drop, or None for l, l^2, l^3, ... with
            l to three digits, so that the mean over all layers is `budget`.
        budget: The mean fraction of vision tokens over all layers, where `ratios` is None.
    """

    no_effect: ClassVar = (
        NoEffect(
            ("budget",),
            "ratios",
            lambda own: own.ratios is not None and own.layers is not None,
            "layers and ratios are given",
        ),
    )

    layers: tuple[PositiveInt, ...] | None = None
    ratios: tuple[Fraction, ...] | None = None
    budget: PositiveFraction = 1 / 9

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if self.layers is not None:
            check_increasing("PyramidDropConfig.layers", self.layers)
        if self.ratios is not None:
            check(
                all(before >= after for before, after in pairwise(self.ratios)),
                f"PyramidDropConfig.ratios = {self.ratios}: expected fractions in 0..1, none above the one before",
            )

    def cuts(self, spec: ModelSpec) -> tuple[int, ...]:
        """See `PrunerConfig.cuts`."""
        return self.layers or _default_layers(spec.decoder_layers, self.budget)

    def fractions(self, spec: ModelSpec) -> tuple[float, ...]:
        """The fractions of the original vision tokens that are left after each of `cuts`."""
        return self.ratios or _powers(self.cuts(spec), spec.decoder_layers, self.budget)

    def check_model(self, spec: ModelSpec) -> None:
        """See `PrunerConfig.check_model`."""
        layers, depth = self.cuts(spec), spec.decoder_layers
        check(
            all(1 <= layer < depth for layer in layers),
            f"pruning 'pyramid_drop': layers = {layers} do not fit a decoder of {depth} layers; set layers to integers "
            f"in 1..{depth - 1}",
        )
        if self.ratios is None:
            check(
                self.budget * depth >= layers[0],
                f"pruning 'pyramid_drop': the first {layers[0]} of {depth} layers read every token, so the layer "
                f"average cannot fall below {layers[0] / depth:.4g}, budget = {self.budget:.4g}; raise budget, or "
                "set layers that begin earlier",
            )
        fractions = self.fractions(spec)
        check(
            len(fractions) == len(layers),
            f"pruning 'pyramid_drop': {len(fractions)} ratios for {len(layers)} layers {layers}; set as many",
        )

    def kept(self, spec: ModelSpec, layer: int, prompt: PromptSize) -> int:
        """See `PrunerConfig.kept`."""
        vision = prompt.vision
        for cut, fraction in zip(self.cuts(spec), self.fractions(spec), strict=True):
            if layer >= cut:
                vision = int(prompt.vision * fraction)
        return prompt.text + vision

    def build(self, spec: ModelSpec, forward: ForwardPass) -> StageHook[Bool[Array, "B N"]]:
        """See `PrunerConfig.build`. The state is the mask of the vision tokens that are left."""
        decoder, lengths = forward.decoder, forward.lengths
        vision = vision_tokens(forward.batch)
        total, slots = jnp.sum(vision, axis=1), vision.shape[1]
        fractions = dict(zip(self.cuts(spec), self.fractions(spec), strict=True))

        def apply(
            k: int, inputs: DecoderInputs, vision: Bool[Array, "B N"]
        ) -> tuple[DecoderInputs, Bool[Array, "B M"]]:
            fraction = fractions.get(decoder.bounds[k])
            if fraction is not None:
                score = decoder.last_token_attention(k, inputs)
                kept = strongest(score, vision, counts(lambda n: int(n * fraction), total, slots))
                inputs, vision = drop(inputs, ~vision | kept, renumber=True), kept
            return compact((inputs, vision), inputs.segment_ids > 0, row_length(lengths, k))

        return StageHook(apply, vision)


def _default_layers(depth: int, budget: float) -> tuple[int, ...]:
    """The default layers: 2, 6, 12 of 24 and 2, 7, 14 of 28.

    The first is 1 where a first drop at 2 would leave no layer before the second drop, or could not meet the budget.
    """
    first = 2 if round(depth / 4) > 2 and budget * depth >= 2 else 1
    second = max(first + 1, round(depth / 4))
    return first, second, max(second + 1, round(depth / 2))


@functools.cache
def _powers(layers: Sequence[int], depth: int, budget: float) -> tuple[float, ...]:
    """The powers of a fraction of three digits whose mean over the layers is `budget`.

    For a budget of 1/9 the fraction is 0.133 with 24 layers and 0.169 with 28.
    """
    lengths = [stop - begin for begin, stop in pairwise((0, *layers, depth))]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        average = sum(length * middle**power for power, length in enumerate(lengths)) / depth
        low, high = (middle, high) if average < budget else (low, middle)
    fraction = float(f"{low:.3g}")
    return tuple(fraction ** (i + 1) for i in range(len(layers)))
