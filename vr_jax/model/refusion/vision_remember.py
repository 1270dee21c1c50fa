"""Vision Remember: vision tokens re-read the encoder's features between decoder layers.

Source: paper section 3.3; the concrete block is methods.md 5.4-5.9 (there is no official code).

    q = up(LN_q(x));  kv = concat_l LN_l(F^l)          one query per cell, its s*s patches as keys
    x = x + down(MHA(q, kv, kv))                       cross-attention; other `interactions`: whole tile, sampled points
    x = x + MHA(z, z, z)[vision],  z = LN_s([x; t])    bidirectional, t = max over the question's states
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.attention.api import attention
from vr_jax.model.config import VisionRememberConfig, VlmConfig
from vr_jax.model.decoders.qwen2 import DecoderInputs
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
from vr_jax.model.refusion.interactions import INTERACTIONS, FeatureAffine, LocalAttention
from vr_jax.sharding import constrain

EPS = 1e-6
_zeros = nnx.initializers.zeros


class Features(nnx.Module):
    """Normalised features without the norms' affine parts, which every block folds into its own projections; computed
    once and shared by all insertions. No gradient: the encoder is frozen."""

    def __init__(self, config: VisionRememberConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del model, dtype, rngs  # nothing is learned here
        self.norm = config.feature_norm

    def __call__(self, levels: tuple[Float[Array, "B T C S Dv"], ...]) -> Float[Array, "B T C S E"]:
        """E = number of levels * D_v."""
        levels = tuple(jax.lax.stop_gradient(level) for level in levels)
        dtype = levels[0].dtype
        if self.norm == "per_level":
            return jnp.concatenate([normalize(level, EPS).astype(dtype) for level in levels], axis=-1)
        joint = jnp.concatenate(levels, axis=-1)
        return joint if self.norm == "none" else normalize(joint, EPS).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reread:
    """What one insertion of the local cross-attention re-read, float32; zeros for a cell without a token (unused tile,
    cropped by unpad).

    weights: of each cell over its patches (window-major), mean of the heads; they sum to one. update: the length of
    what the cross-attention adds to the cell's token, relative to that of the state it adds it to."""

    weights: Float[Array, "B T C S"]
    update: Float[Array, "B T C"]


class Block(nnx.Module):
    """One insertion of Vision Remember."""

    def __init__(self, config: VisionRememberConfig, model: VlmConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del index  # all insertions are alike
        text, levels = model.decoder, len(config.levels)
        width, inner = text.hidden_size, config.inner_width(model)
        _, self_heads = config.heads(model)
        zero_out = config.init == "zero_out"
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        last = functools.partial(make, init=_zeros) if zero_out else make
        self.ln_q = LayerNorm(width, eps=EPS)
        if config.feature_norm != "none":
            self.ln_f = FeatureAffine(levels, model.encoder.hidden_size)
        self.up = make(width, inner)
        two_layers = config.up == "mlp"
        if two_layers:
            self.up2 = make(inner, inner)
        self.cross_attn = INTERACTIONS[config.interaction](
            config,
            model,
            width if two_layers else inner,
            out_init=_zeros if zero_out and two_layers else None,
            dtype=dtype,
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
        self.config, self.backend, self.rope_theta = config, model.attention, text.rope_theta

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Updates the states at vision tokens; every other state passes through untouched."""
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
        """Cross-attention: each vision token re-reads its window, its tile or points of it."""
        return x + vision.scatter_cells(self._cross_update(self._cross_query(x, vision), vision))

    def reread(self, inputs: DecoderInputs, vision: VisionContext) -> Reread:
        """What the cross-attention does to a stream, to look at. Only for the local interaction (`reread_refusal`)."""
        x = inputs.hidden
        if self.config.order == "self_cross":
            x = self.bidirectional(x, inputs, vision, *self._text_token(x, vision))
        assert isinstance(self.cross_attn, LocalAttention)
        query = self._cross_query(x, vision)
        weights = self.cross_attn.weights(query, vision.features, self._feature_affine)
        update, state = (
            jnp.linalg.norm(cells.astype(jnp.float32), axis=-1)
            for cells in (self._cross_update(query, vision), vision.gather_cells(x))
        )
        shape = vision.features.shape[:3]
        seen = vision.has_token.reshape(shape)
        share = (update / jnp.maximum(state, jnp.finfo(jnp.float32).tiny)).reshape(shape)
        return Reread(weights=jnp.where(seen[..., None], weights, 0), update=jnp.where(seen, share, 0))

    @property
    def _feature_affine(self) -> FeatureAffine | None:
        return self.ln_f if self.config.feature_norm != "none" else None

    def _cross_query(self, x: Float[Array, "B N D"], vision: VisionContext) -> Float[Array, "B cells E"]:
        query = constrain(self.up(self.ln_q(vision.gather_cells(x))), "batch", "cells", "embed")
        return self.up2(jax.nn.gelu(query, approximate=False)) if self.config.up == "mlp" else query

    def _cross_update(self, query: Float[Array, "B cells E"], vision: VisionContext) -> Float[Array, "B cells D"]:
        update = self.cross_attn(query, vision.features, self._feature_affine)
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
        """Full self-attention among the vision tokens of an image (or tile) and its sample's text-guided token, in token
        space: groups are segments. The guide is key and value only; its output row would be discarded."""
        if not self.config.self_attention:
            return x
        config, attn = self.config, self.self_attn
        z, t = self.ln_s(x), self.ln_s(text_token)
        q, k, v = (split_heads(layer(z), attn.heads) for layer in (attn.q, attn.k, attn.v))
        if config.self_positions == "rope":
            rotary = rotary_angles(inputs.positions, q.shape[-1], self.rope_theta)
            q, k = rotate(q, *rotary), rotate(k, *rotary)  # the guide stays at position 0
        groups = vision.token_group(config.self_scope, config.newline_in_self)
        numbers = jnp.arange(1, text_token.shape[1] + 1)
        text_token_group = jnp.where(has_text_token, numbers, -1)  # -1 matches no token
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
        """The optional third sub-layer, on vision tokens."""
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
        """The text-guided token of each group's sample: channel-wise maximum over its text-guided tokens, and whether there
        is any. Zeros where not; T = 0 if no text is pooled at all."""
        if self.config.text_pool == "none":
            return hidden[:, :0], jnp.zeros((hidden.shape[0], 0), bool)
        segment = vision.group_segment(self.config.self_scope)
        pooled = vision.text_token_mask[:, None, :] & (vision.segment_ids[:, None, :] == segment[..., None])
        pooled &= (segment > 0)[..., None]
        exists = jnp.any(pooled, axis=-1)
        # argmax and gather instead of max: the gradient then needs (B, T, D) indices, not a (B, T, N, D) mask.
        masked = jnp.where(pooled[..., None], jax.lax.stop_gradient(hidden)[:, None], -jnp.inf)
        winner = jnp.argmax(masked, axis=2)
        text_token = jnp.take_along_axis(hidden, winner, axis=1)
        return constrain(jnp.where(exists[..., None], text_token, 0), "batch", None, "embed"), exists
