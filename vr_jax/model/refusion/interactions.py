"""The three interactions of Vision Remember (paper, Table 5b): with the window, the whole tile, or sampled points.

An interaction holds the projections around an attention. It maps one query per cell and the features of the tiles to
one update per cell. The features are normalised; `affine` is the affine part of their norm, or None if they have none.
Nothing crosses the border of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.errors import ConfigError
from vr_jax.kernels.window_attention import window_attention, window_weights
from vr_jax.model.layers import MultiHeadAttention, merge_heads, split_heads
from vr_jax.model.refusion.deformable import DeformableAttention
from vr_jax.model.windows import to_raster


class FeatureAffine(nnx.Module):
    """The scale and bias of the features' norms, (levels, channels of a level)."""

    def __init__(self, levels: int, width: int) -> None:
        """Initialises the identity."""
        self.scale = nnx.Param(jnp.ones((levels, width)))
        self.bias = nnx.Param(jnp.zeros((levels, width)))

    def __call__(self, features: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Scales and shifts features with all levels side by side."""
        scale, bias = (p[...].reshape(-1).astype(features.dtype) for p in (self.scale, self.bias))
        return features * scale + bias


class KeyAttention(MultiHeadAttention):
    """Cross-attention in which a group of queries shares all its keys.

    A subclass says what a group is: `keys` gives each group's keys, and `attend` computes the attention.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        *,
        absorbed: bool,
        out_init: Initializer | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the projections.

        Args:
            width: Channels of queries and features.
            out_width: Channels of the update.
            heads: Attention heads.
            absorbed: Whether the projections of keys and values are folded into the query and behind the softmax.
            out_init: Initialiser of the output's kernel; None is torch's default of a linear layer.
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        super().__init__(width, out_width, heads, out_init=out_init, dtype=dtype, rngs=rngs)
        self.absorbed = absorbed

    def __call__(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S E"],
        affine: FeatureAffine | None,
        valid: Bool[Array, "B T C S"] | None = None,
    ) -> Float[Array, "B N O"]:
        """The update of each cell from its query; `valid` are the patches that take part, or None if all do."""
        keys = self.keys(features)
        mask = None if valid is None else valid.reshape(keys.shape[:2])
        grouped, key = self._logit_factors(query, keys, affine)
        if self.absorbed:
            attended = self._absorbed(grouped, key, affine, mask)
        else:
            attended = self._plain(grouped, key, keys, affine, mask)
        return self.out(merge_heads(attended).reshape(query.shape))

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "G K E"]:
        """The K keys of each of G groups of queries."""
        raise NotImplementedError

    def attend(
        self,
        query: Float[Array, "G Q H d"],
        key: Float[Array, "G K h d"],
        value: Float[Array, "G K h v"],
        valid: Bool[Array, "G K"] | None,
        scale: float,
    ) -> Float[Array, "G Q H v"]:
        """The attention to the valid keys; h is H, or 1 where all heads share keys and values (the absorbed form)."""
        raise NotImplementedError

    @property
    def _head_dim(self) -> int:
        return self.q.out_features // self.heads

    def _logit_factors(
        self, query: Float[Array, "B N E"], keys: Float[Array, "G K E"], affine: FeatureAffine | None
    ) -> tuple[Float[Array, "G Q H e"], Float[Array, "G K h e"]]:
        """The queries and keys whose products are the logits.

        The plain form has a query and a key for each head. In the absorbed form all heads share the keys (h = 1), which
        are the features themselves, and the queries are as wide as these.
        """
        grouped = split_heads(self.q(query), self.heads).reshape(keys.shape[0], -1, self.heads, self._head_dim)
        if not self.absorbed:
            return grouped, split_heads(self.k(_with(affine, keys)), self.heads)
        key = split_heads(self.k.weight(), self.heads)
        if affine is not None:
            key = key * affine.scale[...].reshape(-1)[:, None, None]
        return jnp.einsum("gqhd,ehd->gqhe", grouped, key.astype(grouped.dtype)), keys[:, :, None, :]

    def _plain(
        self,
        query: Float[Array, "G Q H d"],
        key: Float[Array, "G K H d"],
        keys: Float[Array, "G K E"],
        affine: FeatureAffine | None,
        valid: Bool[Array, "G K"] | None,
    ) -> Float[Array, "G Q H d"]:
        """The reference: values of every patch are projected."""
        value = split_heads(self.v(_with(affine, keys)), self.heads)
        return self.attend(query, key, value, valid, self._head_dim**-0.5)

    def _absorbed(
        self,
        query: Float[Array, "G Q H e"],
        shared: Float[Array, "G K 1 e"],
        affine: FeatureAffine | None,
        valid: Bool[Array, "G K"] | None,
    ) -> Float[Array, "G Q H d"]:
        """The same function with the value projection behind the softmax (docs/design/decisions.md#decision-6).

        It is exact. The bias of the keys and that of the norm shift all logits of a query alike and cancel in the
        softmax. The weights sum to one, so the bias of the values passes through.
        """
        value = split_heads(self.v.weight(), self.heads)
        assert self.v.bias is not None
        value_bias = split_heads(self.v.bias[...], self.heads)
        if affine is not None:
            scale, bias = affine.scale[...].reshape(-1), affine.bias[...].reshape(-1)
            value_bias = value_bias + jnp.einsum("e,ehd->hd", bias, value)
            value = value * scale[:, None, None]
        context = self.attend(query, shared, shared, valid, self._head_dim**-0.5)
        return jnp.einsum("gqhe,ehd->gqhd", context, value.astype(query.dtype)) + value_bias.astype(query.dtype)


def _with(affine: FeatureAffine | None, features: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return features if affine is None else affine(features)


class LocalAttention(KeyAttention):
    """Each query attends to the patches of its own cell."""

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        *,
        absorbed: bool,
        kernel: str,
        out_init: Initializer | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the projections; `kernel` is the backend of `window_attention`, the rest as in the base."""
        super().__init__(width, out_width, heads, absorbed=absorbed, out_init=out_init, dtype=dtype, rngs=rngs)
        self.kernel = kernel

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "W S E"]:
        """The patches of each of W cells."""
        return features.reshape(-1, *features.shape[3:])

    def attend(
        self,
        query: Float[Array, "W 1 H d"],
        key: Float[Array, "W S h d"],
        value: Float[Array, "W S h v"],
        valid: Bool[Array, "W S"] | None,
        scale: float,
    ) -> Float[Array, "W 1 H v"]:
        """Attention of one query to its window.

        Raises:
            ConfigError: The chosen kernel does not run here.
        """
        try:
            return window_attention(query[:, 0], key, value, valid, scale=scale, backend=self.kernel)[:, None]
        except ConfigError as error:
            raise ConfigError(f"refusion.kernel = {self.kernel!r}: {error}") from error

    def weights(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S E"],
        affine: FeatureAffine | None,
        valid: Bool[Array, "B T C S"] | None = None,
    ) -> Float[Array, "B T C S"]:
        """The attention weights of each query over the patches of its cell, float32, averaged over the heads.

        Patches that are not valid have zeros.
        """
        keys = self.keys(features)
        mask = None if valid is None else valid.reshape(keys.shape[:2])
        grouped, key = self._logit_factors(query, keys, affine)
        weights = window_weights(grouped[:, 0], key, mask, scale=self._head_dim**-0.5)
        return jnp.mean(weights, axis=1).reshape(features.shape[:-1])


class GlobalAttention(KeyAttention):
    """Each query attends to all patches of its tile (docs/design/methods.md#interaction-variants)."""

    @staticmethod
    def keys(features: Float[Array, "B T C S E"]) -> Float[Array, "G K E"]:
        """The patches of each tile."""
        batch, tiles, cells, patches, width = features.shape
        return features.reshape(batch * tiles, cells * patches, width)

    def attend(
        self,
        query: Float[Array, "G Q H d"],
        key: Float[Array, "G K h d"],
        value: Float[Array, "G K h v"],
        valid: Bool[Array, "G K"] | None,
        scale: float,
    ) -> Float[Array, "G Q H v"]:
        """Attention of the queries of a tile to its patches, all of which are valid."""
        assert valid is None
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="xla")


class SampledAttention(DeformableAttention):
    """Each query reads some points per level and head, at learned distances from the centre of its cell.

    The maps of the levels stay apart. A learned vector per level is added before the value projection, as in Deformable
    DETR.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        levels: int,
        points: int,
        *,
        out_init: Initializer | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the projections and the vectors of the levels; see `DeformableAttention`."""
        super().__init__(width, out_width, heads, levels, points, out_init=out_init, dtype=dtype, rngs=rngs)
        self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (levels, width)))

    def __call__(
        self,
        query: Float[Array, "B N E"],
        features: Float[Array, "B T C S F"],
        affine: FeatureAffine | None,
        valid: Bool[Array, "B T C S"] | None = None,
    ) -> Float[Array, "B N O"]:
        """The update of each cell from its query; `features` hold all levels side by side, F = levels * E."""
        assert valid is None
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
    """The centres (x, y) of the cells of a tile, in units of the tile."""
    row, column = np.divmod(np.arange(side * side), side)
    return ((np.stack([column, row], axis=-1) + 0.5) / side).astype(np.float32)
