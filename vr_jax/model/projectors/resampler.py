"""`resampler` is that of Qwen-VL and MiniCPM-V: one cross-attention of a grid of learned queries; positions are sines.

Source: HwwwwwwwH/MiniCPM-V-2 `resampler.py` (`Resampler`); docs/design/methods.md#resampler and #minicpm-v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.fields import NoEffect, PositiveInt, check
from vr_jax.model.batch import TilePlaces
from vr_jax.model.layers import LayerNorm, MultiHeadAttention, linear, merge_heads, normal, split_heads
from vr_jax.model.registry import Layout, ProjectorConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.model.windows import raster_order, slot_patches
from vr_jax.sharding import Rules

# The positions of P patches, for all tiles or for each of them.
Positions = Float[Array | np.ndarray, "P Dt"] | Float[Array, "M P Dt"]

EPS = 1e-6
# torch's trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
_init = normal(0.02)


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(ProjectorConfig, name="resampler"):
    """A grid of queries, one for each window of stride x stride patches; the attention is as wide as the decoder.

    Attributes:
        queries: Queries per side, for an encoder whose slices have any grid of patches. None for full square tiles,
            where the stride says it.
        heads: Attention heads, or None for one per 128 channels.
        adaptive: Whether keys have the positions of their own grid, as in MiniCPM-V. Otherwise they have the positions
            of the queries, resized bicubically, as in Qwen-VL.
    """

    sharding_rules: ClassVar[Rules] = (
        (r"query", P(None, "fsdp")),
        (r"(kv_proj|proj)\.kernel", P("fsdp", "tensor")),
    )

    no_effect: ClassVar = (
        NoEffect(
            ("stride",), "queries", lambda own: own.queries is not None, "`queries` says how many tokens there are"
        ),
    )
    layouts: ClassVar[tuple[Layout, ...]] = ("square", "raster")

    queries: PositiveInt | None = None
    heads: PositiveInt | None = None
    adaptive: bool = True

    def cells_per_side(self, grid: int) -> int:
        """See `ProjectorConfig.cells_per_side`."""
        return self.queries or super().cells_per_side(grid)

    def head_count(self, spec: ModelSpec) -> int:
        """The number of attention heads in a model."""
        return self.heads or max(1, spec.decoder_width // 128)

    def check_model(self, spec: ModelSpec) -> None:
        """See `ProjectorConfig.check_model`."""
        width, heads = spec.decoder_width, self.head_count(spec)
        check(width % heads == 0, f"projector.heads = {heads} does not divide the decoder's width {width}; set another")
        check(
            width % 4 == 0,
            f"projector 'resampler': decoder.hidden_size = {width} is not divisible by 4, which two-dimensional sine "
            "positions need",
        )
        raster = spec.layout == "raster"
        check(
            (self.queries is not None) == raster,
            f"projector.queries = {self.queries} with an encoder of the layout {spec.layout!r}: "
            + ("set the number of queries per side" if raster else "set it to None; projector.stride says how many"),
        )
        check(
            self.adaptive or not raster,
            "projector.adaptive = False with an encoder of the layout 'raster': keys of slices of any grid have the "
            "positions of that grid; set it to True",
        )

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`. The projection of the queries is not counted: all tiles share it."""
        patches, cells, width = spec.patches_per_tile, spec.cells_per_tile, spec.decoder_width
        keys_values = patches * (spec.encoder_width * width + 2 * width**2)
        return 2 * (keys_values + 2 * cells * patches * width + 2 * cells * width**2)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Resampler:
        """See `ProjectorConfig.build`."""
        return Resampler(self, spec, rngs=rngs)


class Resampler(nnx.Module):
    """Learned queries attend to all patches of a tile; LayerNorm and a linear layer follow."""

    def __init__(self, config: ResamplerConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises queries and layers for the widths of `spec`."""
        vision, width, dtype = spec.encoder_width, spec.decoder_width, spec.dtype
        self.query = nnx.Param(_init(rngs.params(), (spec.cells_per_tile, width)))
        if vision != width:
            self.kv_proj = linear(vision, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.ln_q = LayerNorm(width, eps=EPS)
        self.ln_kv = LayerNorm(width, eps=EPS)
        self.attn = MultiHeadAttention(width, width, config.head_count(spec), out_init=_init, dtype=dtype, rngs=rngs)
        self.ln_post = LayerNorm(width, eps=EPS)
        self.proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=normal(width**-0.5))
        self.side, self.adaptive, self.dtype = spec.cells_per_side, config.adaptive, dtype

    def __call__(
        self, features: Float[Array, "*B C S Dv"], places: TilePlaces | None = None
    ) -> Float[Array, "*B Q Dt"]:
        """Maps the patches of a tile to its vision tokens.

        Args:
            features: The patches of the tiles, in the order of the encoder's layout.
            places: The grids of the slices, for the layout "raster".
        """
        *batch, cells, patches, width = features.shape
        if places is not None:
            return self._slices(features, places)
        grid = round((cells * patches) ** 0.5)
        positions = self.key_positions(grid, grid)[raster_order(grid, round(patches**0.5))]
        tokens = self.resample(features.reshape(-1, cells * patches, width), positions)
        return tokens.reshape(*batch, *tokens.shape[1:])

    def _slices(self, features: Float[Array, "*B 1 P Dv"], places: TilePlaces) -> Float[Array, "*B Q Dt"]:
        """The vision tokens of slots that hold slices of any grid."""
        *batch, _, patches, width = features.shape
        place = slot_patches(places.extent.reshape(-1, 2), patches)
        # A slice has at most as many rows or columns as its slot has patches.
        table = jnp.asarray(one_axis_positions(np.arange(patches), self.query.shape[-1]), jnp.float32)
        positions = jnp.concatenate([table[place.column], table[place.row]], axis=-1)
        tokens = self.resample(features.reshape(-1, patches, width), positions, place.valid)
        return tokens.reshape(*batch, *tokens.shape[1:])

    def resample(
        self, patches: Float[Array, "M P Dv"], positions: Positions, valid: Bool[Array, "M P"] | None = None
    ) -> Float[Array, "M Q Dt"]:
        """The vision tokens of M tiles.

        Args:
            patches: The features of P patches, in any order.
            positions: The positions of the patches, in the same order; for all tiles or for each of them.
            valid: The patches that take part, or None if all do.

        Returns:
            One vision token for each query.
        """
        return self.proj(self.ln_post(self.attend(self.keys_values(patches), positions, valid)))

    def keys_values(self, patches: Float[Array, "M P Dv"]) -> Float[Array, "M P Dt"]:
        """The features in the decoder's width; positions are added to keys only."""
        return self.ln_kv(self.kv_proj(patches) if hasattr(self, "kv_proj") else patches)

    def attend(
        self, values: Float[Array, "M P Dt"], positions: Positions, valid: Bool[Array, "M P"] | None = None
    ) -> Float[Array, "M Q Dt"]:
        """Attention of the queries to the valid patches, which have the given positions."""
        query = self.ln_q(self.query[...].astype(self.dtype))
        q = self.attn.q(query + jnp.asarray(self.query_positions, self.dtype))
        k, v = self.attn.k(values + jnp.asarray(positions, self.dtype)), self.attn.v(values)
        q, k, v = (split_heads(x, self.attn.heads) for x in (jnp.broadcast_to(q, (len(k), *q.shape)), k, v))
        mask = None if valid is None else valid[:, None, None, :]
        return self.attn.out(merge_heads(jax.nn.dot_product_attention(q, k, v, mask=mask)))

    @property
    def query_positions(self) -> Float[np.ndarray, "Q Dt"]:
        """The positions of the queries' grid, row by row."""
        return sine_positions(self.side, self.side, self.query.shape[-1])

    def key_positions(self, rows: int, columns: int) -> Float[np.ndarray, "P Dt"]:
        """The positions of a grid of patches, row by row."""
        width = self.query.shape[-1]
        if self.adaptive:
            return sine_positions(rows, columns, width)
        queries = self.query_positions.reshape(self.side, self.side, width)
        resized: np.ndarray = np.einsum(
            "hi,wj,ijd->hwd", bicubic(self.side, rows), bicubic(self.side, columns), queries
        )
        return np.asarray(resized.reshape(rows * columns, width), np.float32)


def sine_positions(rows: int, columns: int, width: int) -> Float[np.ndarray, "P D"]:
    """Two-dimensional sine positions of a grid, row by row.

    The first half of the channels holds the column, the second half the row. Each half holds sin(p w_k), then
    cos(p w_k), with w_k = 10000^(-4 k / width).
    """
    row, column = np.indices((rows, columns))
    both = np.concatenate([one_axis_positions(axis, width) for axis in (column, row)], axis=-1)
    return both.reshape(rows * columns, width).astype(np.float32)


def one_axis_positions(positions: Int[np.ndarray, "*B"], width: int) -> Float[np.ndarray, "*B D"]:
    """The half of the channels of `sine_positions` that holds one axis, float64."""
    angle = positions[..., None] * 1e4 ** (-np.arange(width // 4) / (width // 4))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def bicubic(inputs: int, outputs: int) -> Float[np.ndarray, "O I"]:
    """The matrix that resizes one axis as torch's bicubic `interpolate` does.

    It samples at pixel centres without antialiasing and repeats the edges. torch's cubic has a = -0.75, that of
    `jax.image.resize` has a = -0.5.
    """
    a = -0.75
    centre = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((outputs, inputs))
    for offset in (-1, 0, 1, 2):
        x = np.abs(centre - first - offset)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        source = np.clip(first + offset, 0, inputs - 1)
        np.add.at(weights, (np.arange(outputs), source), np.where(x <= 1, near, far))
    return weights
