"""FastV (Chen et al., ECCV 2024): after layer K, keep the vision tokens that layer K's last token attends to most.

Source: pkunlp-icler/FastV, the variant with a cache, which prunes once at prefill; methods.md 4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp

from vr_jax.model.batch import Batch
from vr_jax.model.config_base import PromptSize, PrunerConfig, check, check_choice
from vr_jax.model.pruning.dropping import (
    Between,
    compact,
    counts,
    drop,
    last_token_attention,
    strongest,
    vision_tokens,
)
from vr_jax.model.qwen2 import Stream

if TYPE_CHECKING:
    from vr_jax.model.config import LlavaConfig
    from vr_jax.model.llava import Levels, Llava


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

    def cuts(self, model: LlavaConfig) -> tuple[int, ...]:
        return (self.layer - 1, self.layer)

    def check_model(self, model: LlavaConfig) -> None:
        depth = model.text.num_layers
        check(
            isinstance(self.layer, int) and 1 <= self.layer < depth,
            f"pruning 'fastv': layer = {self.layer} outside the decoder; expected an integer in 1..{depth - 1}",
        )
        check(
            self.budget == "after_layer" or self.keep * depth >= self.layer,
            f"pruning 'fastv': {self.layer} of {depth} layers see every token, so the layer average cannot fall below "
            f"{self.layer / depth:.4g}, keep = {self.keep:.4g}; raise keep, lower layer, or use budget 'after_layer'",
        )

    def count(self, model: LlavaConfig, total: int) -> int:
        """How many of `total` vision tokens are kept. Python's rounding of a float64 product, as FastV's."""
        depth, fraction = model.text.num_layers, self.keep
        if self.budget == "layer_average":
            fraction = (self.keep * depth - self.layer) / (depth - self.layer)
        return round(total * fraction)

    def kept(self, model: LlavaConfig, layer: int, prompt: PromptSize) -> int:
        return prompt.text + (prompt.vision if layer < self.layer else self.count(model, prompt.vision))


def start(config: FastVConfig, model: Llava, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None) -> Between:
    """See `pruning.Entry`."""
    vision = vision_tokens(batch)
    count = counts(lambda n: config.count(model.config, n), jnp.sum(vision, axis=1), vision.shape[1])
    bounds = model.config.decoder_bounds
    score = jnp.zeros(vision.shape)  # known once the layer before the drop is reached

    def between(k: int, stream: Stream) -> Stream:
        nonlocal vision, score
        if bounds[k] == config.layer:
            stream = drop(stream, ~vision | strongest(score, vision, count), renumber=False)
        stream, vision = compact((stream, vision), stream.segment_ids > 0, lengths[k] if lengths else None)
        if bounds[k] == config.layer - 1:
            score = last_token_attention(model.decoder, k, stream)
        return stream

    return between
