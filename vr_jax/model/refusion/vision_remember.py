"""`vision_remember`: vision tokens re-read the encoder's features between decoder layers (Vision Remember).

    q = up(LN_q(x));  kv = concat_l LN_l(F^l)          one query per cell, the patches of its window are its keys
    x = x + down(MHA(q, kv, kv))                       cross-attention; other interactions read the tile or some points
    x = x + MHA(z, z, z)[vision],  z = LN_s([x; t])    bidirectional; t is the maximum over the states of the question

Source: section 3.3 of the paper, which has no public code; docs/design/methods.md#vision-remember-block holds every
choice that the paper leaves open.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.fields import NoEffect, NonNegativeInt, PositiveInt, check
from vr_jax.kernels.attention import attention
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.layers import (
    LayerNorm,
    MultiHeadAttention,
    linear,
    merge_heads,
    normalize,
    rotary_angles,
    rotate,
    split_heads,
)
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.interactions import FeatureAffine, GlobalAttention, LocalAttention, SampledAttention
from vr_jax.model.registry import Layout, RefusionConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.pytree import array_dataclass
from vr_jax.sharding import Rules, constrain

EPS = 1e-6
_zeros = nnx.initializers.zeros


@dataclass(frozen=True, kw_only=True)
class VisionRememberConfig(RefusionConfig, name="vision_remember"):
    """Vision Remember. Fields with choices stand for what the paper leaves open (docs/design/methods.md#ambiguities).

    Attributes:
        interaction: What a vision token re-reads (paper, Table 5b): the patches of its window, all patches of its tile,
            or sampled points of its tile.
        cross_attention: How the local and the global interaction are computed. "absorbed" folds the projections of keys
            and values into the query and behind the softmax; "plain" is its reference and computes the same function.
        kernel: Backend of the local interaction (`vr_jax.kernels.window_attention`). "auto" takes the fastest one for
            the platform and the shapes.
        cross_heads: Heads of the cross-attention, or None for one per 128 channels, or per 64 in the deformable one.
        points: Sampled points per head and level of the deformable interaction.
        self_attention: Whether there is a bidirectional self-attention among the vision tokens.
        self_heads: Heads of the self-attention, or None for as many as the decoder has.
        up: "linear" projects the query up by one layer and the update down by another. "mlp" projects the query by two
            layers, and the attention's output projection leads to the decoder's width.
        residual_gate: "tanh" scales every update by the tanh of a learned number, which starts at zero.
        init: "zero_out" starts the last layer of every update at zero, so that the decoder is unchanged at first.
            "torch_default" starts it like any other.
        feature_norm: Whether each level has its own LayerNorm, all levels share one, or there is none.
        order: Whether the cross-attention or the self-attention comes first.
        ffn_multiplier: Width of a third, feed-forward sub-layer in widths of the decoder; 0 for no such sub-layer.
        self_scope: Whether vision tokens attend to those of the whole image or of their tile.
        newline_in_self: Whether newline tokens take part in the self-attention.
        text_pool: The text that the text-guided token pools: that of the first turn, of all of the user's turns, or all
            text. "all" leaks the answers and is for tests. "all_human" leaks them where a sample has several turns,
            because a later question has read the answers before it.
        self_positions: Whether queries and keys of the self-attention are rotated by the decoder's positions.
        shared_weights: Whether all insertions are one block.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows", "raster")
    # In the deformable interaction the offsets and weights of a head lie side by side.
    sharding_rules: ClassVar[Rules] = (
        (r".+\.up2\.kernel", P("tensor", "fsdp")),
        (r".+\.up2\.bias", P(None)),
        (r".+\.(gate_cross|gate_self|gate_ffn)", P()),
        (r".+\.(offsets|weights|value)\.kernel", P("fsdp", "tensor")),
        (r".+\.(offsets|weights|value)\.bias", P("tensor")),
        (r".+\.output\.kernel", P("tensor", "fsdp")),
        (r".+\.output\.bias", P(None)),
        (r".+\.level_embed", P()),
    )

    no_effect: ClassVar = (
        NoEffect(
            ("points",),
            "interaction",
            lambda own: own.interaction != "deformable",
            "only the deformable interaction samples points",
        ),
        NoEffect(
            ("cross_attention",),
            "interaction",
            lambda own: own.interaction == "deformable",
            "the deformable interaction has one way to be computed",
        ),
        NoEffect(
            ("kernel",), "interaction", lambda own: own.interaction != "local", "only the local interaction has kernels"
        ),
        NoEffect(
            ("kernel",),
            "cross_attention",
            lambda own: own.cross_attention == "plain",
            "only the absorbed attention has kernels",
        ),
        NoEffect(
            ("self_heads", "self_scope", "newline_in_self", "self_positions", "text_pool", "order"),
            "self_attention",
            lambda own: not own.self_attention,
            "there is no self-attention",
        ),
    )

    interaction: Literal["local", "deformable", "global"] = "local"
    cross_attention: Literal["absorbed", "plain"] = "absorbed"
    kernel: Literal["auto", "reference", "pallas_tpu", "pallas_gpu"] = "auto"
    cross_heads: PositiveInt | None = None
    points: PositiveInt = 4
    self_attention: bool = True
    self_heads: PositiveInt | None = None
    up: Literal["linear", "mlp"] = "linear"
    residual_gate: Literal["none", "tanh"] = "none"
    init: Literal["zero_out", "torch_default"] = "zero_out"
    feature_norm: Literal["per_level", "joint", "none"] = "per_level"
    order: Literal["cross_self", "self_cross"] = "cross_self"
    ffn_multiplier: NonNegativeInt = 0
    self_scope: Literal["image", "tile"] = "image"
    newline_in_self: bool = False
    text_pool: Literal["none", "first_turn", "all_human", "all"] = "first_turn"
    self_positions: Literal["none", "rope"] = "none"
    shared_weights: bool = False

    @property
    def blocks(self) -> int:
        """See `RefusionConfig.blocks`."""
        return 1 if self.shared_weights else len(self.insert_after)

    @property
    def pooled_text(self) -> str:
        """See `RefusionConfig.pooled_text`."""
        return self.text_pool

    def inner_width(self, spec: ModelSpec) -> int:
        """Channels of the cross-attention: those of all levels together, or of one level in the deformable form."""
        return spec.encoder_width * (1 if self.interaction == "deformable" else len(self.levels))

    def heads(self, spec: ModelSpec) -> tuple[int, int]:
        """Heads of the cross-attention and of the self-attention in a model."""
        depth = 64 if self.interaction == "deformable" else 128
        return self.cross_heads or max(1, self.inner_width(spec) // depth), self.self_heads or spec.decoder_heads

    def check_model(self, spec: ModelSpec) -> None:
        """See `RefusionConfig.check_model`."""
        check(
            self.interaction == "local" or spec.layout == "square",
            f"refusion.interaction = {self.interaction!r}: it reads whole tiles, and those of the layout "
            f"{spec.layout!r} hold places without a patch; set it to 'local'",
        )
        check(
            self.self_positions == "none" or not (spec.multi_axis and spec.layout == "windows"),
            f"refusion.self_positions = {self.self_positions!r} with decoder.rope_sections: it rotates by the time "
            "axis, which is the same for all tokens of an image, so that it would tell none apart; set it to 'none'",
        )
        widths = self.inner_width(spec), spec.decoder_width
        for name, heads, width in zip(("cross_heads", "self_heads"), self.heads(spec), widths, strict=True):
            check(width % heads == 0, f"refusion.{name} = {heads} does not divide the width {width}; set a divisor")
        check(
            self.init != "zero_out" or self.residual_gate == "none",
            "re-fusion block: residual_gate 'tanh' starts at zero; with init 'zero_out' no gradient would reach the "
            "block, use init 'torch_default'",
        )

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `RefusionConfig.flops_per_tile`. The attention among vision tokens is not counted."""
        queries, width = spec.cells_per_tile, spec.decoder_width
        patches = queries * spec.window_size  # Adaptive windows overlap, and a patch counts once for each.
        inner, (heads, _) = self.inner_width(spec), self.heads(spec)
        query = 2 * queries * (width * inner + inner**2)
        out = 2 * queries * (inner**2 + inner * width)
        if self.up == "mlp":
            query += 2 * queries * inner**2
            out = 2 * queries * inner * width
        keys = patches if self.interaction == "global" else spec.window_size
        if self.interaction == "deformable":
            samples = queries * heads * len(self.levels) * self.points
            # Values of all levels; three numbers for each sample (offset and weight); four corners of each.
            cross = 2 * len(self.levels) * patches * inner**2 + 6 * samples * inner + 8 * samples * inner // heads
            query -= 2 * queries * inner**2  # The deformable attention has no query projection.
        elif self.cross_attention == "plain":
            cross = 4 * patches * inner**2 + 4 * queries * keys * inner
        else:  # Two more products per query absorb keys and values; all heads read the features themselves.
            cross = 4 * queries * inner**2 + 4 * queries * keys * inner * heads
        self_attention = 8 * queries * width**2 if self.self_attention else 0
        block = query + cross + out + self_attention + 4 * queries * self.ffn_multiplier * width**2
        return len(self.insert_after) * block

    def build_features(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Features:
        """See `RefusionConfig.build_features`."""
        del spec, rngs
        return Features(self)

    def build(self, spec: ModelSpec, index: int, *, rngs: nnx.Rngs) -> Block:
        """See `RefusionConfig.build`. All insertions are alike."""
        del index
        return Block(self, spec, rngs=rngs)


class Features(nnx.Module):
    """The levels side by side, normalised, computed once for all insertions.

    The affine part of the norms is not applied here: every block folds its own into its projections. The encoder gets
    no gradient.
    """

    def __init__(self, config: VisionRememberConfig) -> None:
        """Takes the form of the norm; nothing is learned here."""
        self.norm = config.feature_norm

    def __call__(self, levels: tuple[Float[Array, "B T C S Dv"], ...]) -> Float[Array, "B T C S E"]:
        """Joins the levels; E is their number times D_v."""
        levels = tuple(jax.lax.stop_gradient(level) for level in levels)
        dtype = levels[0].dtype
        if self.norm == "per_level":
            return jnp.concatenate([normalize(level, EPS).astype(dtype) for level in levels], axis=-1)
        joint = jnp.concatenate(levels, axis=-1)
        return joint if self.norm == "none" else normalize(joint, EPS).astype(dtype)


@array_dataclass
class Reread:
    """The attention of one insertion of the local interaction, float32.

    A cell without a token, in an unused tile or cropped by unpad, has zeros.

    Attributes:
        weights: The attention weights of each cell over its patches, averaged over the heads; they sum to one.
        update: The norm of what the cross-attention adds to the cell's token, relative to that of the token's state.
    """

    weights: Float[Array, "*B T C S"]
    update: Float[Array, "*B T C"]


class Block(nnx.Module):
    """One insertion of Vision Remember."""

    def __init__(self, config: VisionRememberConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the sub-layers for the widths of `spec`."""
        dtype = spec.dtype
        width, inner = spec.decoder_width, config.inner_width(spec)
        _, self_heads = config.heads(spec)
        zero_out = config.init == "zero_out"
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        last = functools.partial(make, init=_zeros) if zero_out else make
        self.ln_q = LayerNorm(width, eps=EPS)
        if config.feature_norm != "none":
            self.ln_f = FeatureAffine(len(config.levels), spec.encoder_width)
        self.up = make(width, inner)
        two_layers = config.up == "mlp"
        if two_layers:
            self.up2 = make(inner, inner)
        self.cross_attn = _interaction(
            config,
            spec,
            width if two_layers else inner,
            out_init=_zeros if zero_out and two_layers else None,
            rngs=rngs,
        )
        if not two_layers:
            self.down = last(inner, width)
        if config.self_attention:
            self.ln_s = LayerNorm(width, eps=EPS)
            out_init = _zeros if zero_out else None
            self.self_attn = MultiHeadAttention(width, width, self_heads, out_init=out_init, dtype=dtype, rngs=rngs)
        if config.ffn_multiplier:
            self.ln_ffn = LayerNorm(width, eps=EPS)
            self.ffn1 = make(width, config.ffn_multiplier * width)
            self.ffn2 = last(config.ffn_multiplier * width, width)
        if config.residual_gate == "tanh":
            self.gate_cross = nnx.Param(jnp.zeros(()))
            if config.self_attention:
                self.gate_self = nnx.Param(jnp.zeros(()))
            if config.ffn_multiplier:
                self.gate_ffn = nnx.Param(jnp.zeros(()))
        self.config, self.backend, self.rope_theta = config, spec.attention, spec.rope_theta

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Updates the hidden states of vision tokens and leaves all others as they are."""
        text_token, has_text_token = self._text_token(inputs.hidden, vision)
        x = inputs.hidden
        if self.config.order == "cross_self":
            x = self.cross(x, vision)
            x = self.bidirectional(x, inputs, vision, text_token, has_text_token)
        else:
            x = self.bidirectional(x, inputs, vision, text_token, has_text_token)
            x = self.cross(x, vision)
        return inputs.replace(hidden=self.feed_forward(x, vision))

    def cross(self, x: Float[Array, "B N D"], vision: VisionContext) -> Float[Array, "B N D"]:
        """The hidden states after the cross-attention, in which each vision token re-reads features."""
        return x + vision.scatter_cells(self._cross_update(self._cross_query(x, vision), vision))

    def reread(self, inputs: DecoderInputs, vision: VisionContext) -> Reread:
        """The weights and updates of the cross-attention, to look at.

        The interaction must be local (`vr_jax.model.reread.reread_refusal`).
        """
        x = inputs.hidden
        if self.config.order == "self_cross":
            x = self.bidirectional(x, inputs, vision, *self._text_token(x, vision))
        assert isinstance(self.cross_attn, LocalAttention)
        query = self._cross_query(x, vision)
        weights = self.cross_attn.weights(query, vision.features, self._feature_affine, vision.valid)
        update, state = (
            jnp.linalg.norm(cells.astype(jnp.float32), axis=-1)
            for cells in (self._cross_update(query, vision), vision.gather_cells(x))
        )
        shape = vision.features.shape[:3]
        has_token = vision.has_token.reshape(shape)
        share = (update / jnp.maximum(state, jnp.finfo(jnp.float32).tiny)).reshape(shape)
        return Reread(weights=jnp.where(has_token[..., None], weights, 0), update=jnp.where(has_token, share, 0))

    @property
    def _feature_affine(self) -> FeatureAffine | None:
        return self.ln_f if self.config.feature_norm != "none" else None

    def _cross_query(self, x: Float[Array, "B N D"], vision: VisionContext) -> Float[Array, "B cells E"]:
        query = constrain(self.up(self.ln_q(vision.gather_cells(x))), "batch", "cells", "embed")
        return self.up2(jax.nn.gelu(query, approximate=False)) if self.config.up == "mlp" else query

    def _cross_update(self, query: Float[Array, "B cells E"], vision: VisionContext) -> Float[Array, "B cells D"]:
        update = self.cross_attn(query, vision.features, self._feature_affine, vision.valid)
        # Without these two constraints XLA (jax 0.12) partitions two products in a row, or the gradient of two,
        # wrongly on a mesh that uses all three axes: other numbers, no error.
        update = constrain(update, "batch", "cells", "embed")
        return self._gated("gate_cross", self.down(update) if self.config.up == "linear" else update)

    def bidirectional(
        self,
        x: Float[Array, "B N D"],
        inputs: DecoderInputs,
        vision: VisionContext,
        text_token: Float[Array, "B T D"],
        has_text_token: Bool[Array, "B T"],
    ) -> Float[Array, "B N D"]:
        """The hidden states after the self-attention among vision tokens.

        It runs on whole rows, with the vision tokens of an image (or tile) and the text-guided token of its sample as
        one segment. The text-guided token is key and value only, because its own result would be discarded.

        Args:
            x: Hidden states.
            inputs: The decoder inputs, for their positions.
            vision: The images of the batch.
            text_token: The text-guided token of each of T groups.
            has_text_token: Whether a group has one.

        Returns:
            The updated hidden states.
        """
        if not self.config.self_attention:
            return x
        config, attn = self.config, self.self_attn
        z, t = self.ln_s(x), self.ln_s(text_token)
        q, k, v = (split_heads(layer(z), attn.heads) for layer in (attn.q, attn.k, attn.v))
        if config.self_positions == "rope":
            rotary = rotary_angles(inputs.positions, q.shape[-1], self.rope_theta)
            q, k = rotate(q, *rotary), rotate(k, *rotary)  # The text-guided token stays at position 0.
        groups = vision.token_group(config.self_scope, config.newline_in_self)
        numbers = jnp.arange(1, text_token.shape[1] + 1)
        text_token_group = jnp.where(has_text_token, numbers, -1)  # No token is in group -1.
        attended = attention(
            q,
            jnp.concatenate([k, split_heads(attn.k(t), attn.heads)], axis=1),
            jnp.concatenate([v, split_heads(attn.v(t), attn.heads)], axis=1),
            query_segments=groups,
            key_segments=jnp.concatenate([groups, text_token_group], axis=1),
            causal=False,
            backend=self.backend,
        )
        update = jnp.where((groups > 0)[..., None], attn.out(merge_heads(attended)), 0)
        return x + self._gated("gate_self", update)

    def feed_forward(self, x: Float[Array, "B N D"], vision: VisionContext) -> Float[Array, "B N D"]:
        """The hidden states after the optional third sub-layer, which acts on vision tokens."""
        if not self.config.ffn_multiplier:
            return x
        update = self.ffn2(jax.nn.gelu(self.ffn1(self.ln_ffn(x)), approximate=False))
        return x + self._gated("gate_ffn", jnp.where(vision.is_vision[..., None], update, 0))

    def _gated(self, gate: str, update: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        if self.config.residual_gate == "none":
            return update
        return update * jnp.tanh(getattr(self, gate)[...]).astype(update.dtype)

    def _text_token(
        self, hidden: Float[Array, "B N D"], vision: VisionContext
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """The text-guided token of each group's sample, and whether there is one.

        It is the maximum of each channel over the tokens of `text_token_mask`, and zero where there are none. If no
        text is pooled at all, there are no groups (T = 0).
        """
        if self.config.text_pool == "none":
            return hidden[:, :0], jnp.zeros((hidden.shape[0], 0), bool)
        segment, states = vision.group_segment(self.config.self_scope), jax.lax.stop_gradient(hidden)
        pooled = vision.text_token_mask[:, None, :] & (vision.segment_ids[:, None, :] == segment[..., None])
        exists = jnp.any(pooled & (segment > 0)[..., None], axis=-1)

        def of_sample(number: Int[Array, ""], winner: Int[Array, "B T D"]) -> Int[Array, "B T D"]:
            pooled = vision.text_token_mask & (vision.segment_ids == number)
            largest = jnp.argmax(jnp.where(pooled[..., None], states, -jnp.inf), axis=1)
            return jnp.where((segment == number)[..., None], largest[:, None].astype(jnp.int32), winner)

        # With argmax and a gather in place of max, the gradient needs (B, T, D) indices and no (B, T, N, D) mask. The
        # loop visits samples, of which a row has few. Groups are as many as tile slots: 1,024 windows of a large image.
        winner = jnp.zeros((*segment.shape, hidden.shape[-1]), jnp.int32)
        winner = jax.lax.fori_loop(1, jnp.max(segment, initial=0) + 1, of_sample, winner)
        text_token = jnp.take_along_axis(hidden, winner, axis=1)
        return constrain(jnp.where(exists[..., None], text_token, 0), "batch", None, "embed"), exists


def _interaction(
    config: VisionRememberConfig,
    spec: ModelSpec,
    out_width: int,
    *,
    out_init: Initializer | None,
    rngs: nnx.Rngs,
) -> LocalAttention | GlobalAttention | SampledAttention:
    """The module of `config.interaction`, whose update has `out_width` channels."""
    width, (heads, _) = config.inner_width(spec), config.heads(spec)
    if config.interaction == "deformable":
        levels = len(config.levels)
        return SampledAttention(
            width, out_width, heads, levels, config.points, out_init=out_init, dtype=spec.dtype, rngs=rngs
        )
    absorbed = config.cross_attention == "absorbed"
    if config.interaction == "global":
        return GlobalAttention(
            width, out_width, heads, absorbed=absorbed, out_init=out_init, dtype=spec.dtype, rngs=rngs
        )
    return LocalAttention(
        width,
        out_width,
        heads,
        absorbed=absorbed,
        kernel=config.kernel,
        out_init=out_init,
        dtype=spec.dtype,
        rngs=rngs,
    )
