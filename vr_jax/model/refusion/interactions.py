"""What a vision token of Vision Remember re-reads (paper, Table 5b): its window, its whole tile, or sampled points.

An interaction holds the projections around the attention, and maps one query per cell to one update per cell:
`__call__(query (B, T*C, E), features (B, T, C, S, L*D_v), affine) -> (B, T*C, out width)`; the features are
normalised, `affine` is their norm's affine part if they have one. Nothing crosses the border of a tile."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.kernels.window_attention import BackendError, window_attention, window_weights
from vr_jax.model.config import ConfigError, VisionRememberConfig, VlmConfig
from vr_jax.model.layers import MultiHeadAttention, merge_heads, split_heads
from vr_jax.model.refusion.deformable import DeformableAttention
from vr_jax.model.windows import to_raster


class FeatureAffine(nnx.Module):
    """Scale and bias of the features' LayerNorms: (levels, D_v)."""

    def __init__(self, levels: int, width: int):
        self.scale = nnx.Param(jnp.ones((levels, width)))
        self.bias = nnx.Param(jnp.zeros((levels, width)))

    def __call__(self, features: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        scale, bias = (p[...].reshape(-1).astype(features.dtype) for p in (self.scale, self.bias))
        return features * scale + bias


class _KeyAttention(MultiHeadAttention):
    """Cross-attention over all keys that a query may see: a group of queries shares its keys.

    Subclasses say which: `keys(features)` are the groups' keys (G, K, E); `attend` does the attention."""

    def __init__(
        self,
        config: VisionRememberConfig,
        model: VlmConfig,
        out_width: int,
        *,
        out_init: Callable | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        heads, _ = config.heads(model)
        super().__init__(config.inner_width(model), out_width, heads, out_init=out_init, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S E"],
        affine: FeatureAffine | None,
    ) -> Float[Array, "B N O"]:
        keys = self.keys(features)
        grouped, read = self._logit_factors(query, keys, affine)
        heads = self._absorbed if self.config.cross_attention == "absorbed" else self._plain
        return self.out(merge_heads(heads(grouped, read, keys, affine)).reshape(query.shape))

    def _logit_factors(
        self, query: Float[Array, "B N E"], keys: Float[Array, "G K E"], affine: FeatureAffine | None
    ) -> tuple[Float[Array, "G Q H e"], Float[Array, "G K h e"]]:
        """The queries and keys whose products are the logits: of each head, or in the absorbed form keys that all heads
        share (h = 1) and queries as wide as they are."""
        grouped = split_heads(self.q(query), self.heads).reshape(keys.shape[0], -1, self.heads, self._depth)
        if self.config.cross_attention == "plain":
            return grouped, split_heads(self.k(_with(affine, keys)), self.heads)
        key = split_heads(self.k.kernel[...], self.heads)
        if affine is not None:
            key = key * affine.scale[...].reshape(-1)[:, None, None]
        return jnp.einsum("gqhd,ehd->gqhe", grouped, key.astype(grouped.dtype)), keys[:, :, None, :]

    @property
    def _depth(self) -> int:
        return self.q.out_features // self.heads

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "G K E"]:
        raise NotImplementedError

    def attend(
        self, query: Float[Array, "G Q H d"], key: Float[Array, "G K h d"], value: Float[Array, "G K h v"], scale: float
    ) -> Float[Array, "G Q H v"]:
        """h is H or, in the absorbed form, 1."""
        raise NotImplementedError

    def _plain(
        self,
        query: Float[Array, "G Q H d"],
        key: Float[Array, "G K H d"],
        keys: Float[Array, "G K E"],
        affine: FeatureAffine | None,
    ) -> Float[Array, "G Q H d"]:
        """Keys and values of every patch are projected: the reference."""
        value = split_heads(self.v(_with(affine, keys)), self.heads)
        return self.attend(query, key, value, self._depth**-0.5)

    def _absorbed(
        self,
        query: Float[Array, "G Q H e"],
        shared: Float[Array, "G K 1 e"],
        keys: Float[Array, "G K E"],
        affine: FeatureAffine | None,
    ) -> Float[Array, "G Q H d"]:
        """The same function with W_k folded into the query and W_v behind the softmax (design decision 3).

        Exact: the key bias and the norm's bias shift all logits of a query alike and cancel in the softmax; the
        weights sum to one, so the value bias passes through."""
        del keys  # they are `shared`
        value = split_heads(self.v.kernel[...], self.heads)
        assert self.v.bias is not None
        value_bias = split_heads(self.v.bias[...], self.heads)
        if affine is not None:
            scale, bias = affine.scale[...].reshape(-1), affine.bias[...].reshape(-1)
            value_bias = value_bias + jnp.einsum("e,ehd->hd", bias, value)
            value = value * scale[:, None, None]
        context = self.attend(query, shared, shared, self._depth**-0.5)
        return jnp.einsum("gqhe,ehd->gqhd", context, value.astype(query.dtype)) + value_bias.astype(query.dtype)


def _with(affine: FeatureAffine | None, features: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return features if affine is None else affine(features)


class LocalAttention(_KeyAttention):
    """Each query sees the patches of its own cell."""

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "W S E"]:
        return features.reshape(-1, *features.shape[3:])

    def attend(self, query, key, value, scale):
        try:
            return window_attention(query[:, 0], key, value, scale=scale, backend=self.config.kernel)[:, None]
        except BackendError as error:
            raise ConfigError(f"refusion.kernel = {self.config.kernel!r}: {error}") from error

    def weights(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S E"],
        affine: FeatureAffine | None,
    ) -> Float[Array, "B T C S"]:
        """How each query spreads over the patches of its cell: the mean of the heads' attention weights, float32."""
        grouped, read = self._logit_factors(query, self.keys(features), affine)
        weights = window_weights(grouped[:, 0], read, scale=self._depth**-0.5)
        return jnp.mean(weights, axis=1).reshape(features.shape[:-1])


class GlobalAttention(_KeyAttention):
    """Each query sees all patches of its tile (methods.md 6: the paper's batch axis is the tiles)."""

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "B*T C*S E"]:
        batch, tiles, cells, patches, width = features.shape
        return features.reshape(batch * tiles, cells * patches, width)

    def attend(self, query, key, value, scale):
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="xla")


class SampledAttention(DeformableAttention):
    """Each query sees `config.points` points per level and head, at learnt distances from the centre of its cell.

    The levels' maps stay apart; a learnt vector per level is added before the value projection, as in DETR."""

    def __init__(
        self,
        config: VisionRememberConfig,
        model: VlmConfig,
        out_width: int,
        *,
        out_init: Callable | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        heads, _ = config.heads(model)
        width, levels = config.inner_width(model), len(config.levels)
        super().__init__(width, out_width, heads, levels, config.points, out_init=out_init, dtype=dtype, rngs=rngs)
        self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (levels, width)))

    def __call__(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S L*E"],
        affine: FeatureAffine | None,
    ) -> Float[Array, "B N O"]:
        batch, tiles, cells, patches, _ = features.shape
        if affine is not None:
            features = affine(features)
        maps = features.reshape(batch * tiles, cells, patches, self.levels, -1)
        maps = maps + self.level_embed[...].astype(maps.dtype)
        value = to_raster(self.value(maps).reshape(batch * tiles, cells, patches, -1))
        value = value.reshape(batch * tiles, cells * patches, self.levels, -1).swapaxes(1, 2)
        side, grid = round(cells**0.5), round((cells * patches) ** 0.5)
        reference = jnp.broadcast_to(_centres(side)[:, None], (1, cells, self.levels, 2))
        update = self.read(
            query.reshape(batch * tiles, cells, -1),
            reference,
            value.reshape(batch * tiles, self.levels * cells * patches, -1),
            [(grid, grid)] * self.levels,
        )
        return update.reshape(batch, tiles * cells, -1)


def _centres(side: int) -> Float[np.ndarray, "C 2"]:
    """Centres (x, y) of the cells of a tile, in units of the tile."""
    row, column = np.divmod(np.arange(side * side), side)
    return ((np.stack([column, row], axis=-1) + 0.5) / side).astype(np.float32)


INTERACTIONS: dict[str, type[_KeyAttention] | type[SampledAttention]] = {
    "local": LocalAttention,
    "global": GlobalAttention,
    "deformable": SampledAttention,
}
