"""The whole LVLM: SigLIP encoder, projector, Qwen2 decoder, re-fusion blocks between decoder stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.qwen2 import Decoder, DecoderInputs, HiddenStates, KVCache
from vr_jax.model.encoders.siglip import Siglip
from vr_jax.model.layers import maybe_remat
from vr_jax.model.projectors import PROJECTORS
from vr_jax.model.pruning import PRUNERS
from vr_jax.model.refusion import REFUSION
from vr_jax.model.refusion.context import VisionContext
from vr_jax.sharding import constrain

# Encoder hidden state -> its features, window-major: C = n*n cells of S = s*s patches.
Levels = Mapping[int, Float[Array, "B T C S Dv"]]


class VisionLanguageModel(nnx.Module):
    """LLaVA, or LLaVA-VR when `config.refusion` is set. An nnx.Module, so a pytree: use plain jax transformations.

    Raises ConfigError for parts that do not fit together, before anything is computed."""

    def __init__(self, config: VlmConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width = config.decoder.hidden_size
        self.encoder = Siglip(
            config.encoder,
            stride=config.projector.stride,
            bounds=config.encoder_bounds,
            attention_backend=config.attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.projector = PROJECTORS[config.projector.name].module(config.projector, config, dtype=dtype, rngs=rngs)
        # LLaVA-NeXT: N(0, 1) / sqrt(D).
        self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.decoder = Decoder(
            config.decoder,
            bounds=config.decoder_bounds,
            refusion=_build_refusion(config, dtype, rngs),
            refusion_features=_build_features(config, dtype, rngs),
            attention_backend=config.attention,
            remat=config.remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.config = config

    def encode_images(self, tile_pixels: UInt8[Array, "B T H W 3"]) -> dict[int, Float[Array, "B T C S Dv"]]:
        """Encoder hidden states at `config.feature_levels`, window-major: C = n*n cells of S = s*s patches."""
        levels = self.config.feature_levels
        return dict(zip(levels, self.encoder(tile_pixels, levels), strict=True))

    def embed(self, batch: Batch, levels: Levels) -> Float[Array, "B N D"]:
        """Input states of the decoder: text embeddings, projected cells at vision tokens, the newline vector."""
        cells = self.projector(*(levels[level] for level in self.config.projector.feature_levels(self.config)))
        cells = cells.reshape(cells.shape[0], -1, cells.shape[-1])
        if batch.vision_cells is None:
            vision = _take(cells, batch.vision_cell)
        else:
            assert batch.vision_weights is not None
            parts = (
                _take(cells, batch.vision_cells[..., i]) * batch.vision_weights[..., i, None].astype(cells.dtype)
                for i in range(4)
            )
            vision = sum(parts, start=jnp.zeros((), cells.dtype))
        hidden = self.decoder.embed(batch.tokens)
        hidden = jnp.where((batch.vision_cell >= 0)[..., None], vision, hidden)
        newline = self.image_newline[...].astype(hidden.dtype)
        hidden = jnp.where((batch.vision_cell == NEWLINE)[..., None], newline, hidden)
        return constrain(hidden, "batch", "seq", "embed")

    def __call__(
        self, batch: Batch, cache: KVCache | None = None, lengths: tuple[int, ...] | None = None
    ) -> tuple[Float[Array, "B M D"], KVCache | None]:
        """Hidden states after the final norm (before the head); with an empty `cache`, prefill and the filled cache.

        lengths: with a pruner, the row length of every decoder stage; rows stay aligned to the right, M is the last
        one. None: dropped tokens stay in place as padding, M = N."""
        return self.run(self.encode_images(batch.tile_pixels), batch, cache, lengths)

    def run(
        self, levels: Levels, batch: Batch, cache: KVCache | None = None, lengths: tuple[int, ...] | None = None
    ) -> tuple[Float[Array, "B M D"], KVCache | None]:
        """The forward pass from the encoder's hidden states on (`encode_images`), for whoever has them already."""
        return self.decoder(self.inputs(levels, batch), cache, self.stage_hook(levels, batch, lengths))

    def hidden_states(self, levels: Levels, batch: Batch, layers: Sequence[int]) -> HiddenStates:
        """The residual stream at the vision tokens, one for each cell of the tile slots, after chosen decoder layers.

        layers: counted from 1, strictly increasing. A cell without a token holds some other token's state. Raises
        ValueError for layers that do not exist, and for a model with a pruner, whose tokens leave the cells."""
        if self.config.pruning is not None:
            raise ValueError(f"hidden_states: pruner {self.config.pruning.name!r} drops vision tokens; switch it off")
        cells = VisionContext.of(batch, None, self.config.cells_per_tile).gather_cells
        return self.decoder.hidden_states(self.inputs(levels, batch), layers, self.stage_hook(levels, batch), cells)

    def inputs(self, levels: Levels, batch: Batch) -> DecoderInputs:
        """What enters the decoder's first layer."""
        return DecoderInputs(hidden=self.embed(batch, levels), positions=batch.positions, segment_ids=batch.segment_ids)

    def stage_hook(
        self, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None = None
    ) -> Callable[[int, DecoderInputs], DecoderInputs] | None:
        """What acts before stage k of the decoder."""
        pruning = self.config.pruning
        if lengths is not None and (pruning is None or len(lengths) != len(self.decoder.stages)):
            raise ValueError(
                f"lengths = {lengths}: expected none without a pruner, else one for each of the decoder's "
                f"{len(self.decoder.stages)} stages"
            )
        if pruning is not None:
            return PRUNERS[pruning.name].start(pruning, self, levels, batch, lengths)
        if self.config.refusion is None:
            return None
        context = self.vision_context(levels, batch)

        def run(block: Any, inputs: DecoderInputs, rows: Any) -> DecoderInputs:
            features = jax.tree.map(lambda x, like: x.reshape(like.shape), rows, context.features)
            return block(inputs, dataclasses.replace(context, features=features))

        # What jax.checkpoint keeps lies in memory in its own shape: as rows of patches, which is what the kernels read.
        # A TPU would pad S = 9 patches of a cell to 16, and copy the features into and out of that for every block.
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]) if x.ndim == 5 else x, context.features)
        apply = maybe_remat(run, self.config.remat)
        return lambda k, inputs: apply(self.refusion(k), inputs, rows) if k else inputs

    def vision_context(self, levels: Levels, batch: Batch) -> VisionContext:
        """What the re-fusion blocks read of the images. Only for a model with one."""
        refusion = self.config.refusion
        assert refusion is not None
        features = self.decoder.refusion_features(tuple(levels[level] for level in refusion.levels))
        return VisionContext.of(batch, features, self.config.cells_per_tile)

    def refusion(self, k: int) -> Any:
        """The block that acts before stage k of the decoder, 1.. . Shared weights are one block."""
        blocks = self.decoder.refusion
        return blocks[min(k, len(blocks)) - 1]

    def init_cache(self, rows: int, length: int | Sequence[int]) -> KVCache:
        """Empty key-value caches of `length` slots, prompt plus new tokens: one number, or one for each stage."""
        return self.decoder.init_cache(rows, length)

    def decode(
        self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: KVCache
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One more token per row through the cache. Re-fusion blocks act in prefill only."""
        return self.decoder.decode(self.decoder.embed(tokens), positions, cache)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output matrix: the embedding's transpose when tied."""
        if self.config.decoder.tie_word_embeddings:
            return self.decoder.embed.embedding[...].T
        return self.decoder.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits, float32."""
        if self.config.decoder.tie_word_embeddings:
            # Not through the transpose: for a single token XLA's CPU compiler reads it column by column, 8 x slower.
            table = self.decoder.embed.embedding[...].astype(hidden.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.decoder.lm_head.kernel[...].astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def _take(cells: Float[Array, "B M D"], index: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    return jnp.take_along_axis(cells, jnp.maximum(index, 0)[..., None], axis=1)


def _build_features(config: VlmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module | None:
    refusion = config.refusion
    return REFUSION[refusion.name].features(refusion, config, dtype=dtype, rngs=rngs) if refusion else None


def _build_refusion(config: VlmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> list[nnx.Module]:
    refusion = config.refusion
    if refusion is None:
        return []
    make = REFUSION[refusion.name].block
    return [make(refusion, config, index, dtype=dtype, rngs=rngs) for index in range(refusion.blocks)]
