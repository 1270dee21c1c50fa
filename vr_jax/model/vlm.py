"""The whole model: encoder, projector, decoder, and re-fusion blocks or a pruner between the decoder's stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs, HiddenStates, KVCache, StageHook
from vr_jax.model.layers import maybe_remat
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import ForwardPass, RefusionConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import constrain

# The encoder's hidden states by number, window-major: C cells of S patches for each tile.
Levels = Mapping[int, Float[Array, "B T C S Dv"]]


class Refusion(nnx.Module):
    """The re-fusion blocks of a model, and the module that prepares the features for them, if there is one."""

    def __init__(self, config: RefusionConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Builds the blocks of `config`."""
        self.blocks = nnx.List([config.build(spec, index, rngs=rngs) for index in range(config.blocks)])
        self.features = config.build_features(spec, rngs=rngs)

    def prepare(self, levels: tuple[Float[Array, "B T C S Dv"], ...]) -> Any:
        """The features that all blocks read. Without a module that prepares them, they are the levels themselves."""
        return jax.lax.stop_gradient(levels) if self.features is None else self.features(levels)

    def block(self, insertion: int) -> Any:
        """The block of an insertion, counted from 0; one block stands for all insertions where they share weights."""
        return self.blocks[min(insertion, len(self.blocks) - 1)]


class VisionLanguageModel(nnx.Module):
    """A vision-language model: LLaVA, or with `config.refusion` for example LLaVA-VR.

    The model is an nnx.Module and so a pytree: use plain jax transformations on it.

    Attributes:
        encoder: Maps tiles to feature levels.
        projector: Maps features to vision tokens.
        image_newline: The vector that ends a row of vision tokens.
        decoder: Runs over the packed rows in stages.
        refusion: The re-fusion blocks, or None.
        config: The description of the model.
    """

    def __init__(self, config: VlmConfig, *, rngs: nnx.Rngs) -> None:
        """Initialises all parameters at random."""
        spec, width = config.spec, config.decoder.hidden_size
        self.encoder = config.encoder.build(spec, bounds=config.encoder_bounds, rngs=rngs)
        self.projector = config.projector.build(spec, rngs=rngs)
        # LLaVA-NeXT starts the newline vector at N(0, 1) / sqrt(width).
        self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.decoder = config.decoder.build(spec, bounds=config.decoder_bounds, rngs=rngs)
        self.refusion = Refusion(config.refusion, spec, rngs=rngs) if config.refusion else None
        self.config = config

    def encode_images(self, batch: Batch) -> dict[int, Float[Array, "B T C S Dv"]]:
        """The encoder's hidden states `config.feature_levels` by number, in the order of the encoder's layout."""
        levels = self.config.feature_levels
        return dict(zip(levels, self.encoder(batch.tile_pixels, levels, batch.tile_places), strict=True))

    def embed(self, batch: Batch, levels: Levels) -> Float[Array, "B N D"]:
        """The decoder's input states: text embeddings, projected cells at vision tokens, and the newline vector."""
        read = self.config.projector.feature_levels(self.config.spec)
        places = {"places": batch.tile_places} if self.config.encoder.layout == "raster" else {}
        cells = self.projector(*(levels[level] for level in read), **places)
        cells = cells.reshape(cells.shape[0], -1, cells.shape[-1])
        if batch.vision_cells is None:
            vision = _take(cells, batch.vision_cell)
        else:
            assert batch.vision_weights is not None
            vision = jnp.zeros((), cells.dtype)
            for i in range(4):
                weight = batch.vision_weights[..., i, None].astype(cells.dtype)
                vision = vision + _take(cells, batch.vision_cells[..., i]) * weight
        hidden = self.decoder.embed(batch.tokens)
        hidden = jnp.where((batch.vision_cell >= 0)[..., None], vision, hidden)
        newline = self.image_newline[...].astype(hidden.dtype)
        hidden = jnp.where((batch.vision_cell == NEWLINE)[..., None], newline, hidden)
        return constrain(hidden, "batch", "seq", "embed")

    def __call__(
        self, batch: Batch, cache: KVCache | None = None, lengths: tuple[int, ...] | None = None
    ) -> tuple[Float[Array, "B M D"], KVCache | None]:
        """Runs whole rows.

        Args:
            batch: The rows.
            cache: Empty caches to fill (prefill), or None.
            lengths: With a pruner, the row length of every decoder stage; rows stay aligned to the right, and M is the
                last length. With None, dropped tokens stay in place as padding, and M = N.

        Returns:
            The hidden states after the final norm, before the head; and the filled caches or None.
        """
        return self.run(self.encode_images(batch), batch, cache, lengths)

    def run(
        self, levels: Levels, batch: Batch, cache: KVCache | None = None, lengths: tuple[int, ...] | None = None
    ) -> tuple[Float[Array, "B M D"], KVCache | None]:
        """Does what `__call__` does, from the result of `encode_images` on."""
        return self.decoder(self.inputs(levels, batch), cache, self.stage_hook(levels, batch, lengths))

    def hidden_states(self, levels: Levels, batch: Batch, layers: Sequence[int]) -> HiddenStates:
        """The hidden states of the vision tokens after chosen decoder layers.

        Args:
            levels: The result of `encode_images`.
            batch: The rows.
            layers: Numbers of decoder layers, counted from 1 and strictly increasing.

        Returns:
            The state of the token of each cell of the tile slots. A cell without a token holds some other token's
            state.

        Raises:
            ValueError: A layer does not exist, or the model has a pruner, whose tokens leave the cells.
        """
        if self.config.pruning is not None:
            raise ValueError(f"hidden_states: pruner {self.config.pruning.name!r} drops vision tokens; switch it off")
        cells = VisionContext.of(batch, None, self.config.cells_per_tile).gather_cells
        return self.decoder.hidden_states(self.inputs(levels, batch), layers, self.stage_hook(levels, batch), cells)

    def inputs(self, levels: Levels, batch: Batch) -> DecoderInputs:
        """The inputs of the decoder's first layer."""
        return DecoderInputs(
            hidden=self.embed(batch, levels),
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            grid_positions=batch.grid_positions,
        )

    def stage_hook(self, levels: Levels, batch: Batch, lengths: tuple[int, ...] | None = None) -> StageHook[Any] | None:
        """The hook that prunes or applies the re-fusion blocks, or None for a plain model.

        Args:
            levels: The result of `encode_images`.
            batch: The rows.
            lengths: The row lengths of the decoder's stages, for a pruner.

        Raises:
            ValueError: `lengths` are given without a pruner, or not one for each stage.
        """
        config, bounds = self.config, self.config.decoder_bounds
        if lengths is not None and (config.pruning is None or len(lengths) != len(bounds) - 1):
            raise ValueError(
                f"lengths = {lengths}: expected none without a pruner, else one for each of the decoder's "
                f"{len(bounds) - 1} stages"
            )
        if config.pruning is not None:
            forward = ForwardPass(
                encoder=self.encoder, decoder=self.decoder, levels=levels, batch=batch, lengths=lengths
            )
            return config.pruning.build(config.spec, forward)
        if config.refusion is None or self.refusion is None:
            return None
        refusion, insertions = self.refusion, config.refusion.insert_after
        context = self._slot_context(levels, batch)

        def run(block: Any, inputs: DecoderInputs, rows: Any) -> DecoderInputs:
            features = jax.tree.map(lambda x, like: x.reshape(like.shape), rows, context.features)
            after: DecoderInputs = block(inputs, dataclasses.replace(context, features=features).in_windows())
            return after

        # What jax.checkpoint keeps lies in memory in its own shape: as rows of patches, which is what the kernels read.
        # A TPU would pad S = 9 patches of a cell to 16, and copy the features into and out of that for every block.
        # Adaptive windows overlap and are partly empty, so that they are gathered within the block and not kept.
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]) if x.ndim == 5 else x, context.features)
        checkpointed = maybe_remat(run, config.remat)

        def apply(k: int, inputs: DecoderInputs, state: None) -> tuple[DecoderInputs, None]:
            if bounds[k] not in insertions:
                return inputs, state
            return checkpointed(refusion.block(insertions.index(bounds[k])), inputs, rows), state

        return StageHook(apply, None)

    def vision_context(self, levels: Levels, batch: Batch) -> VisionContext:
        """The images as the re-fusion blocks see them. The model must have re-fusion blocks."""
        return self._slot_context(levels, batch).in_windows()

    def _slot_context(self, levels: Levels, batch: Batch) -> VisionContext:
        """The same, before the features of adaptive windows are gathered."""
        assert self.config.refusion is not None
        assert self.refusion is not None
        features = self.refusion.prepare(tuple(levels[level] for level in self.config.refusion.levels))
        return VisionContext.of(batch, features, self.config.cells_per_tile, self.config.window_slots)

    def init_cache(self, rows: int, length: int | Sequence[int]) -> KVCache:
        """Empty key-value caches; see `DecoderModule.init_cache`."""
        return self.decoder.init_cache(rows, length)

    def decode(
        self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: KVCache
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Runs one more token per row through the caches. Re-fusion blocks and pruners act in the prefill only."""
        return self.decoder.decode(self.decoder.embed(tokens), positions, cache)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output matrix, which is the embedding's transpose where the two are tied."""
        return self.decoder.head_kernel()

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The vocabulary logits of normed hidden states, float32."""
        return self.decoder.logits(hidden)


def abstract_model(config: VlmConfig) -> VisionLanguageModel:
    """Returns a model with the shapes and types of its parameters in place of arrays.

    Args:
        config: The model's config.

    Returns:
        A model of its own, which the caller may change. Building the same config again takes no time.
    """
    leaves, structure = _abstract_leaves(config, jax.config.jax_enable_x64)
    model: VisionLanguageModel = structure.unflatten(leaves)
    return model


# A run asks for the same model several times: for its parameters, its operations and its files.
@functools.lru_cache(maxsize=16)
def _abstract_leaves(config: VlmConfig, x64: bool) -> tuple[list[Any], Any]:
    """The leaves and the structure of an abstract model; 64-bit types depend on a setting of JAX."""
    return jax.tree.flatten(nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0))))


def _take(cells: Float[Array, "B M D"], index: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """The cell of each token; any cell where the index is negative."""
    return jnp.take_along_axis(cells, jnp.maximum(index, 0)[..., None], axis=1)
