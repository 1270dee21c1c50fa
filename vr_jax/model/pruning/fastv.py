"""FastV (Chen et al., ECCV 2024): after layer K, keep the vision tokens that layer K's last token attends to most.

Source: pkunlp-icler/FastV, the variant with a cache, which prunes once at prefill; methods.md 4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
from vr_jax.model.registry import PromptSize, PrunerConfig, check, check_choice

if TYPE_CHECKING:
    from vr_jax.model.config import VlmConfig
    from vr_jax.model.vlm import Levels, VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class FastVConfig(PrunerConfig):
    """Kept tokens keep their positions. FastV's own R is 1 - keep."""

    name: str = "fastv"
    layer: int = 2  # K: decoder layers that see every token
    keep: float = 1 / 9  # fraction of the vision tokens
    # after_layer: `keep` are left after layer K. layer_average: so many fewer that the mean over all layers is `keep`.
    budget: Literal["after_layer", "layer_average"] = "after_layer"

    def __post_init__(self):
        check(0 <= self.keep <= 1, f"FastVConfig.keep = {self.keep}: expected a fraction in 0..1")
        check_choice("FastVConfig", "budget", self.budget, ("after_layer", "layer_average"))

    def cuts(self, model: VlmConfig) -> tuple[int, ...]:
        return (self.layer - 1, self.layer)

    def check_model(self, model: VlmConfig) -> None:
        depth = model.decoder.num_layers
        check(
            isinstance(self.layer, int) and 1 <= self.layer < depth,
            f"pruning 'fastv': layer = {self.layer} outside the decoder; expected an integer in 1..{depth - 1}",
        )
        check(
            self.budget == "after_layer" or self.keep * depth >= self.layer,
            f"pruning 'fastv': {self.layer} of {depth} layers see every token, so the layer average cannot fall below "
            f"{self.layer / depth:.4g}, keep = {self.keep:.4g}; raise keep, lower layer, or use budget 'after_layer'",
        )

    def count(self, model: VlmConfig, total: int) -> int:
        """How many of `total` vision tokens are kept. Python's rounding of a float64 product, as FastV's."""
        depth, fraction = model.decoder.num_layers, self.keep
        if self.budget == "layer_average":
            fraction = (self.keep * depth - self.layer) / (depth - self.layer)
        return round(total * fraction)

    def kept(self, model: VlmConfig, layer: int, prompt: PromptSize) -> int:
        return prompt.text + (prompt.vision if layer < self.layer else self.count(model, prompt.vision))


def start(
    config: FastVConfig, model: VisionLanguageModel, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None
) -> StageHook:
    """See `pruning.Entry`."""
    vision = vision_tokens(batch)
    count = counts(lambda n: config.count(model.config, n), jnp.sum(vision, axis=1), vision.shape[1])
    bounds = model.config.decoder_bounds
    score = jnp.zeros(vision.shape)  # known once the layer before the drop is reached

    def stage_hook(k: int, inputs: DecoderInputs) -> DecoderInputs:
        nonlocal vision, score
        if bounds[k] == config.layer:
            inputs = drop(inputs, ~vision | strongest(score, vision, count), renumber=False)
        inputs, vision = compact((inputs, vision), inputs.segment_ids > 0, lengths[k] if lengths else None)
        if bounds[k] == config.layer - 1:
            score = last_token_attention(model.decoder, k, inputs)
        return inputs

    return stage_hook
