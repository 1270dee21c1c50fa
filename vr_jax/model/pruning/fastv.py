"""`fastv` keeps the vision tokens that the last token attends to most in layer K (Chen et al., ECCV 2024).

Source: pkunlp-icler/FastV `src/FastV/llava-hf/transformers/src/transformers/models/llama/modeling_llama.py`, the
variant with a key-value cache, which prunes once at prefill; docs/design/methods.md#fastv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vr_jax.fields import Fraction, PositiveInt, check
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.pruning.dropping import compact, counts, drop, row_length, strongest, vision_tokens
from vr_jax.model.registry import ForwardPass, PrunerConfig
from vr_jax.model.spec import ModelSpec, PromptSize


@dataclass(frozen=True, kw_only=True)
class FastVConfig(PrunerConfig, name="fastv"):
    """FastV. Kept tokens keep their positions.

    Attributes:
        layer: The number K of decoder layers that read every token.
        keep: The fraction of the vision tokens that is kept. FastV's own R is 1 - keep.
        budget: "after_layer" keeps the fraction after layer K. "layer_average" keeps so many fewer that the mean over
            all layers is the fraction.
    """

    layer: PositiveInt = 2
    keep: Fraction = 1 / 9
    budget: Literal["after_layer", "layer_average"] = "after_layer"

    def cuts(self, spec: ModelSpec) -> tuple[int, ...]:
        """See `PrunerConfig.cuts`."""
        del spec
        return (self.layer - 1, self.layer)

    def check_model(self, spec: ModelSpec) -> None:
        """See `PrunerConfig.check_model`."""
        depth = spec.decoder_layers
        check(
            self.layer < depth,
            f"pruning 'fastv': layer = {self.layer} outside the decoder; expected an integer in 1..{depth - 1}",
        )
        check(
            self.budget == "after_layer" or self.keep * depth >= self.layer,
            f"pruning 'fastv': {self.layer} of {depth} layers read every token, so the layer average cannot fall below "
            f"{self.layer / depth:.4g}, keep = {self.keep:.4g}; raise keep, lower layer, or use budget 'after_layer'",
        )

    def count(self, spec: ModelSpec, total: int) -> int:
        """How many of `total` vision tokens are kept: Python's rounding of a float64 product, as in FastV."""
        depth, fraction = spec.decoder_layers, self.keep
        if self.budget == "layer_average":
            fraction = (self.keep * depth - self.layer) / (depth - self.layer)
        return round(total * fraction)

    def kept(self, spec: ModelSpec, layer: int, prompt: PromptSize) -> int:
        """See `PrunerConfig.kept`."""
        return prompt.text + (prompt.vision if layer < self.layer else self.count(spec, prompt.vision))

    def build(self, spec: ModelSpec, forward: ForwardPass) -> StageHook[tuple[Bool[Array, "B N"], Float[Array, "B S"]]]:
        """See `PrunerConfig.build`. The state is the mask of vision tokens and, once layer K has them, their scores."""
        decoder, lengths = forward.decoder, forward.lengths
        vision = vision_tokens(forward.batch)
        count = counts(lambda n: self.count(spec, n), jnp.sum(vision, axis=1), vision.shape[1])

        def apply(
            k: int, inputs: DecoderInputs, state: tuple[Bool[Array, "B N"], Float[Array, "B S"]]
        ) -> tuple[DecoderInputs, tuple[Bool[Array, "B M"], Float[Array, "B R"]]]:
            vision, score = state
            if decoder.bounds[k] == self.layer:
                inputs = drop(inputs, ~vision | strongest(score, vision, count), renumber=False)
            inputs, vision = compact((inputs, vision), inputs.segment_ids > 0, row_length(lengths, k))
            if decoder.bounds[k] == self.layer - 1:
                score = decoder.last_token_attention(k, inputs)
            return inputs, (vision, score)

        return StageHook(apply, (vision, jnp.zeros(vision.shape)))
