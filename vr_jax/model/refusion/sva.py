"""`sva` is Cambrian-1's spatial vision aggregator inside the decoder: each vision token attends to its window.

Source: cambrian-mllm/cambrian `cambrian/model/vision_sampler.py` (`VisionCrossAttentionLayer`, "joint"),
`cambrian/model/cambrian_arch.py` (auxiliary projection, global context) and
`cambrian/model/language_model/cambrian_llama.py` (the samplers in the decoder); docs/design/methods.md#sva. There is no
gate and no zero initialisation, as in the original.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.fields import NonNegativeInt, PositiveInt, check
from vr_jax.kernels.window_attention import window_attention
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.layers import LayerNorm, linear, merge_heads, normal, split_heads, stack_layers
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import RefusionConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import Rules, constrain

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SvaConfig(RefusionConfig, name="sva"):
    """The aggregator after layers 1 and 4, as Vision Remember has it by default.

    Cambrian's own default (start 0, stride 3) in a decoder of L layers is `insert_after` = 1, 4, 7, ... up to L.

    Attributes:
        levels: Exactly one level.
        width: Channels of the auxiliary features and of the attention.
        heads: Attention heads.
        depth: Layers of one insertion.
    """

    sharding_rules: ClassVar[Rules] = (
        (r".+\.(proj_context|proj_in)\.kernel", P("fsdp", "tensor")),
        (r".+\.pos_embed", P()),
    )

    levels: tuple[NonNegativeInt, ...] = (23,)
    width: PositiveInt = 1024
    heads: PositiveInt = 16
    depth: PositiveInt = 1

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(len(self.levels) == 1, f"SvaConfig.levels = {self.levels}: expected exactly one level")
        check(
            self.width % self.heads == 0,
            f"SvaConfig.heads = {self.heads} does not divide width = {self.width}; set a divisor",
        )

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `RefusionConfig.flops_per_tile`."""
        queries, patches, width = spec.cells_per_tile, spec.patches_per_tile, self.width
        features = patches * width * (spec.encoder_width + width)
        # Query and output of the attention, and the two products on either side, one of them with the decoder's width.
        per_query = 2 * width * (spec.decoder_width + 2 * width)
        layer = width**2 + queries * per_query + 2 * patches * width * (width + 1)
        return 2 * (features + len(self.insert_after) * self.depth * layer)

    def build_features(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Features:
        """See `RefusionConfig.build_features`."""
        return Features(self, spec, rngs=rngs)

    def build(self, spec: ModelSpec, index: int, *, rngs: nnx.Rngs) -> Block:
        """See `RefusionConfig.build`. All insertions are alike."""
        del index
        return Block(self, spec, rngs=rngs)


class SvaFeatures(NamedTuple):
    """The auxiliary features that all insertions share.

    Attributes:
        windows: The projected features.
        context: Their mean over each tile.
        valid: The patches that belong to the image where a tile is padded; None where all do.
    """

    windows: Float[Array, "B T C S E"]
    context: Float[Array, "B T E"]
    valid: Bool[Array, "B T C S"] | None = None


class Features(nnx.Module):
    """The auxiliary projection of the level, and each tile's global context. The encoder gets no gradient."""

    def __init__(self, config: SvaConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises Linear, exact GELU, Linear and LayerNorm."""
        self.fc1 = linear(spec.encoder_width, config.width, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(config.width, config.width, dtype=spec.dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=EPS)

    def __call__(self, levels: tuple[Float[Array, "B T C S Dv"]]) -> SvaFeatures:
        """Projects the one level."""
        (level,) = jax.lax.stop_gradient(levels)
        windows = self.norm(self.fc2(jax.nn.gelu(self.fc1(level), approximate=False)))
        windows = constrain(windows, "batch", "tiles", "cells", None, "embed")
        return SvaFeatures(windows, jnp.mean(windows, axis=(2, 3)))


class WindowAttention(nnx.Module):
    """Attention of one query to its window, with a LayerNorm before each projection of it; no projection has a bias."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises norms and projections for `width` channels."""
        make = functools.partial(linear, width, width, dtype=dtype, rngs=rngs, use_bias=False)
        self.ln_q, self.ln_k, self.ln_v = (LayerNorm(width, eps=EPS) for _ in range(3))
        self.q, self.k, self.v, self.out = make(), make(), make(), make()
        self.heads = heads

    def __call__(
        self,
        query: Float[Array, "B C E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None,
    ) -> Float[Array, "B C E"]:
        """The update of C queries from their windows; `valid` is the mask of the patches, or None for all."""
        q = split_heads(self.q(self.ln_q(query)), self.heads)
        k = split_heads(self.k(self.ln_k(windows)), self.heads)
        v = split_heads(self.v(self.ln_v(windows)), self.heads)
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        attended = window_attention(q, k, v, None if valid is None else valid.reshape(-1, valid.shape[-1]))
        return self.out(merge_heads(attended).reshape(query.shape))


class VisionCrossAttentionLayer(nnx.Module):
    """Cambrian's "joint" layer for one encoder."""

    def __init__(
        self, query_width: int, width: int, patches: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Initialises the layer.

        Args:
            query_width: Channels of the queries, those of the decoder.
            width: Channels of the features and of the attention.
            patches: Patches of a window.
            heads: Attention heads.
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        make = functools.partial(linear, dtype=dtype, rngs=rngs, use_bias=False)
        self.proj_context = make(width, width)
        self.proj_in = make(query_width + width, width)
        if patches > 1:
            self.pos_embed = nnx.Param(normal(1.0)(rngs.params(), (patches, width)))
        self.cross_attn = WindowAttention(width, heads, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = make(width, width)
        self.fc2 = make(width, query_width)

    def __call__(
        self,
        query: Float[Array, "B C D"],
        context: Float[Array, "B G E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None,
    ) -> Float[Array, "B C D"]:
        """The queries after this layer.

        Args:
            query: C queries.
            context: The contexts of G tiles; each is that of C / G consecutive queries.
            windows: The window of each query.
            valid: The patches that belong to the image; None where all do.

        Returns:
            The updated queries.
        """
        context = jnp.repeat(self.proj_context(context), query.shape[1] // context.shape[1], axis=1)
        x = self.proj_in(constrain(jnp.concatenate([query, context], axis=-1), "batch", "cells", "embed"))
        if windows.shape[2] > 1:
            windows = windows + self.pos_embed[...].astype(windows.dtype)
        x = constrain(x, "batch", "cells", "embed")
        x = x + constrain(self.cross_attn(x, windows, valid), "batch", "cells", "embed")
        return query + self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))


class Block(nnx.Module):
    """One insertion: `SvaConfig.depth` layers (`VisionTokenSampler`)."""

    def __init__(self, config: SvaConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""

        def layer(rngs: nnx.Rngs) -> VisionCrossAttentionLayer:
            return VisionCrossAttentionLayer(
                spec.decoder_width, config.width, spec.patches_per_cell, config.heads, dtype=spec.dtype, rngs=rngs
            )

        self.layers = stack_layers(layer, config.depth, rngs)

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Updates the hidden states of vision tokens and leaves all others as they are."""
        features: SvaFeatures = vision.features
        cells = constrain(vision.gather_cells(inputs.hidden), "batch", "cells", "embed")
        rows = cells.shape[0]
        windows = features.windows.reshape(rows, -1, *features.windows.shape[3:])
        valid = None if features.valid is None else features.valid.reshape(rows, -1, features.valid.shape[-1])
        read = self.read(cells, features.context, windows, valid)
        hidden = jnp.where(vision.is_vision[..., None], vision.scatter_cells(read), inputs.hidden)
        return inputs.replace(hidden=hidden)

    def read(
        self,
        query: Float[Array, "B C D"],
        context: Float[Array, "B G E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None = None,
    ) -> Float[Array, "B C D"]:
        """The queries after all layers; the arguments are those of `VisionCrossAttentionLayer`."""

        def run(x: Float[Array, "B C D"], layer: VisionCrossAttentionLayer) -> tuple[Float[Array, "B C D"], None]:
            return constrain(layer(x, context, windows, valid), "batch", "cells", "embed"), None

        return jax.lax.scan(run, query, self.layers)[0]
