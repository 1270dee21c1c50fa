"""`vispruner` keeps the patches that the encoder attends to most, and a diverse rest (Zhang et al., ICCV 2025).

Source: Theia-4869/VisPruner (`encode_images`, `prepare_inputs_labels_for_multimodal`);
docs/design/methods.md#vispruner.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.fields import Fraction, PositiveInt, check
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.pruning.dropping import compact, drop, row_length
from vr_jax.model.registry import EncoderModule, ForwardPass, PrunerConfig
from vr_jax.model.spec import ModelSpec, PromptSize

STEP = 8  # The number of tokens that a round of merging removes.


@dataclass(frozen=True, kw_only=True)
class VisPrunerConfig(PrunerConfig, name="vispruner"):
    """VisPruner, which selects patches of each tile before the decoder runs and renumbers the kept tokens.

    The official layout has no newlines (`image.unpad` is False, see `adapt_image`). With unpad, newlines are kept.

    Attributes:
        tokens: Number of patches that are kept of each tile.
        important_ratio: The fraction of them that is chosen by attention; the others are chosen by dissimilarity.
    """

    tokens: PositiveInt = 64
    important_ratio: Fraction = 0.5

    @property
    def important(self) -> int:
        """The number of patches that are chosen by attention."""
        return int(self.tokens * self.important_ratio)

    def cuts(self, spec: ModelSpec) -> tuple[int, ...]:
        """See `PrunerConfig.cuts`."""
        del spec
        return (0,)

    def feature_levels(self, spec: ModelSpec) -> tuple[int, ...]:
        """See `PrunerConfig.feature_levels`: the features that are compared, and the input of the last layer."""
        return (spec.feature_level, spec.encoder_layers - 1)

    def check_model(self, spec: ModelSpec) -> None:
        """See `PrunerConfig.check_model`."""
        patches = spec.patches_per_tile
        check(
            spec.encoder_gives_attention,
            f"pruning 'vispruner' ranks patches by the attention that they receive in the encoder's last layer, which "
            f"the encoder {spec.encoder!r} does not give; use 'fastv' or 'pyramid_drop'",
        )
        check(
            spec.projector == "mlp",
            f"pruning 'vispruner' selects patches: it needs the projector 'mlp', one token per patch, found "
            f"{spec.projector!r} with stride {spec.stride}",
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

    def adapt_image(self, image: Any) -> Any:
        """See `PrunerConfig.adapt_image`."""
        return dataclasses.replace(image, unpad=False)

    def kept(self, spec: ModelSpec, layer: int, prompt: PromptSize) -> int:
        """See `PrunerConfig.kept`. With unpad, fewer are left where selected patches lie in the padding."""
        del spec, layer
        return prompt.text + prompt.newlines + min(prompt.cells, prompt.tiles * self.tokens)

    def build(self, spec: ModelSpec, forward: ForwardPass) -> StageHook[None]:
        """See `PrunerConfig.build`. The hook carries no state."""
        batch, levels, lengths = forward.batch, forward.levels, forward.lengths
        main, last = (levels[level] for level in self.feature_levels(spec))
        chosen = selected(self, forward.encoder, main, last)
        chosen = chosen.reshape(chosen.shape[0], -1)
        keep = (batch.vision_cell < 0) | jnp.take_along_axis(chosen, jnp.maximum(batch.vision_cell, 0), axis=1)

        def apply(k: int, inputs: DecoderInputs, state: None) -> tuple[DecoderInputs, None]:
            if k == 0:
                inputs = drop(inputs, keep, renumber=True)
            return compact(inputs, inputs.segment_ids > 0, row_length(lengths, k)), state

        return StageHook(apply, None)


def rounds(left: int, diverse: int) -> list[tuple[int, int]]:
    """The rounds that bring `left` tokens down to `diverse`, as (size of the list, number of tokens removed).

    If `diverse` is 0, no token is kept and no round is needed.
    """
    found = []
    while left > diverse > 0:
        found.append((left, min(STEP, left - diverse)))
        left -= found[-1][1]
    return found


def select(
    features: Float[Array, "patches D"], attention: Float[Array, " patches"], important: int, diverse: int
) -> tuple[Int[Array, " important"], Int[Array, " diverse"]]:
    """Selects patches of one tile.

    Each round splits the list of the rest into its even and odd places, and removes the even ones that are most similar
    to an odd one. The other even ones follow in falling similarity, then the odd ones.

    Args:
        features: The features to compare.
        attention: The attention that each patch receives.
        important: The number of patches that are chosen by attention.
        diverse: The number of patches that are chosen from the rest by dissimilarity.

    Returns:
        The important patches in falling order of attention, and the diverse ones in the order of the official list.
    """
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

    def merge(
        remaining: Int[Array, " rest"], size_and_removed: tuple[Int[Array, ""], Int[Array, ""]]
    ) -> tuple[Int[Array, " rest"], None]:
        # The list keeps its length, and only its first `size` places count.
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
    config: VisPrunerConfig,
    encoder: EncoderModule,
    features: Float[Array, "B T C 1 D"],
    hidden: Float[Array, "B T C 1 D"],
) -> Bool[Array, "B T C"]:
    """The mask of the patches of every tile that are kept.

    Args:
        config: The numbers of patches.
        encoder: The encoder, whose last layer attends.
        features: The features to compare.
        hidden: The input of the encoder's last layer.

    Returns:
        True for the patches that are kept.
    """
    diverse = config.tokens - config.important

    # One tile at a time, because the attention of a tile takes patches x patches numbers for every head.
    def attended(hidden: Float[Array, "B C 1 D"]) -> Float[Array, "B C 1"]:
        return jnp.mean(encoder.received_attention(hidden), axis=-3)

    attention = jnp.moveaxis(jax.lax.map(attended, jnp.moveaxis(hidden, 1, 0)), 0, 1)

    def of_tile(features: Float[Array, "C D"], attention: Float[Array, " C"]) -> Bool[Array, " C"]:
        chosen = jnp.concatenate(select(features, attention, config.important, diverse))
        return jnp.zeros(len(features), bool).at[chosen].set(True)

    return jax.vmap(jax.vmap(of_tile))(features.squeeze(-2), attention.squeeze(-1))
