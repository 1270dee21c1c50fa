"""VisPruner (Zhang et al., ICCV 2025): per tile, the patches the encoder attends to most, and a diverse rest.

Source: Theia-4869/VisPruner `encode_images`, `prepare_inputs_labels_for_multimodal`; methods.md 4.3."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import Batch
from vr_jax.model.decoders.qwen2 import DecoderInputs
from vr_jax.model.pruning.dropping import StageHook, compact, drop
from vr_jax.model.registry import PromptSize, PrunerConfig, check

if TYPE_CHECKING:
    from vr_jax.model.config import ImageConfig, VlmConfig
    from vr_jax.model.encoders.siglip import Siglip
    from vr_jax.model.vlm import Levels, VisionLanguageModel

STEP = 8  # tokens that a round of merging removes


@dataclass(frozen=True, kw_only=True)
class VisPrunerConfig(PrunerConfig):
    """Selects patches of each tile before the decoder runs; kept tokens are renumbered.

    The official layout has no newlines (`image.unpad` False, see `adapt_image`). With unpad, newlines are kept."""

    name: str = "vispruner"
    tokens: int = 64  # per tile
    important_ratio: float = 0.5  # of them, chosen by attention; the others by dissimilarity

    def __post_init__(self):
        owner = "VisPrunerConfig"
        check(
            isinstance(self.tokens, int) and self.tokens >= 1,
            f"{owner}.tokens = {self.tokens}: expected an integer, at least 1 per tile",
        )
        check(0 <= self.important_ratio <= 1, f"{owner}.important_ratio = {self.important_ratio}: expected 0..1")

    @property
    def important(self) -> int:
        return int(self.tokens * self.important_ratio)

    def cuts(self, model: VlmConfig) -> tuple[int, ...]:
        return (0,)

    def feature_levels(self, model: VlmConfig) -> tuple[int, ...]:
        """The features compared, and what the encoder's last block attends from."""
        return (model.vision_feature_layer, model.encoder.num_layers - 1)

    def check_model(self, model: VlmConfig) -> None:
        patches = model.encoder.grid**2
        check(
            model.projector.name == "mlp",
            f"pruning 'vispruner' selects patches: it needs the projector 'mlp', one token per patch, found "
            f"{model.projector.name!r} with stride {model.projector.stride}",
        )
        check(
            self.tokens <= patches,
            f"pruning 'vispruner': tokens = {self.tokens} of a tile's {patches}; set at most {patches}",
        )
        left, diverse = patches - self.important, self.tokens - self.important
        for size, removed in rounds(left, diverse):
            check(
                size % 2 == 0,
                f"pruning 'vispruner': {left} patches ({patches} - {self.important} important) cannot be split into "
                "pairs; choose tokens and important_ratio so that they are even",
            )
            check(
                removed <= size // 2,
                f"pruning 'vispruner': {diverse} diverse tokens cannot be reached from {patches} patches, a round "
                f"would remove {removed} of {size // 2}; use none, or at least {STEP}",
            )

    def adapt_image(self, image: ImageConfig) -> ImageConfig:
        return dataclasses.replace(image, unpad=False)

    def kept(self, model: VlmConfig, layer: int, prompt: PromptSize) -> int:
        # With unpad, selected patches may lie in the padding: then fewer are left.
        return prompt.text + prompt.newlines + min(prompt.cells, prompt.tiles * self.tokens)


def rounds(left: int, diverse: int) -> list[tuple[int, int]]:
    """(size of the list, tokens removed) of every round that brings `left` tokens down to `diverse`; 0 keeps none and
    takes no round."""
    found = []
    while left > diverse > 0:
        found.append((left, min(STEP, left - diverse)))
        left -= found[-1][1]
    return found


def select(
    features: Float[Array, "patches D"], attention: Float[Array, " patches"], important: int, diverse: int
) -> tuple[Int[Array, " important"], Int[Array, " diverse"]]:
    """Patches of one tile: the most attended ones in falling order, and the diverse rest in the official list's order.

    Each round splits the list into its even and odd places and removes the even ones that are most similar to an odd
    one; the other even ones follow in falling similarity, then the odd ones."""
    patches = features.shape[0]
    features = features.astype(jnp.float32)
    features /= jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    order = jnp.argsort(-attention, stable=True)
    remaining = order[important:]
    plan = rounds(patches - important, diverse)
    if not plan:
        return order[:important], remaining[:diverse]
    similarity = jnp.einsum("pd,qd->pq", features, features, precision="highest")
    half = jnp.arange(len(remaining) // 2)
    place = jnp.arange(len(remaining))

    def merge(remaining, size_and_removed):
        # The list keeps its length; only its first `size` places count.
        size, removed = size_and_removed
        even, odd = remaining[0::2], remaining[1::2]
        valid = half < size // 2
        nearest = jnp.max(similarity[even[:, None], odd[None]], axis=1, where=valid[None], initial=-jnp.inf)
        falling = jnp.argsort(jnp.where(valid, -nearest, jnp.inf), stable=True)
        survivors = size // 2 - removed
        source = jnp.where(place < survivors, removed + place, len(half) + place - survivors)
        return jnp.concatenate([even[falling], odd]).at[source].get(mode="clip"), None

    sizes, removed = np.array(plan, np.int32).T
    remaining, _ = jax.lax.scan(merge, remaining, (sizes, removed))
    return order[:important], remaining[:diverse]


def selected(
    config: VisPrunerConfig, siglip: Siglip, features: Float[Array, "B T C 1 D"], hidden: Float[Array, "B T C 1 D"]
) -> Bool[Array, "B T C"]:
    """Which patches of every tile are kept. hidden: what enters the encoder's last block."""
    diverse = config.tokens - config.important

    # Tile by tile: the attention map of a tile is patches x patches for every head.
    def attended(hidden):
        return jnp.mean(siglip.received_attention(hidden), axis=-3)

    attention = jnp.moveaxis(jax.lax.map(attended, jnp.moveaxis(hidden, 1, 0)), 0, 1)

    def of_tile(features, attention):
        chosen = jnp.concatenate(select(features, attention, config.important, diverse))
        return jnp.zeros(len(features), bool).at[chosen].set(True)

    return jax.vmap(jax.vmap(of_tile))(features.squeeze(-2), attention.squeeze(-1))


def start(
    config: VisPrunerConfig, model: VisionLanguageModel, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None
) -> StageHook:
    """See `pruning.Entry`."""
    vision = model.config.encoder
    chosen = selected(config, model.encoder, levels[model.config.vision_feature_layer], levels[vision.num_layers - 1])
    chosen = chosen.reshape(chosen.shape[0], -1)
    keep = (batch.vision_cell < 0) | jnp.take_along_axis(chosen, jnp.maximum(batch.vision_cell, 0), axis=1)

    def stage_hook(k: int, inputs: DecoderInputs) -> DecoderInputs:
        if k == 0:
            inputs = drop(inputs, keep, renumber=True)
        return compact(inputs, inputs.segment_ids > 0, lengths[k] if lengths else None)

    return stage_hook
