"""`resampler`: one cross-attention of learned queries on a grid, all positions as 2-D sines (Qwen-VL, MiniCPM-V).

Source: MiniCPM-V-2 `resampler.py` (`Resampler`); methods.md 8.2."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import LayerNorm, MultiHeadAttention, linear, merge_heads, normal, split_heads
from vr_jax.model.registry import ProjectorConfig, check
from vr_jax.model.windows import raster_order

EPS = 1e-6
# torch's trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
_init = normal(0.02)


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(ProjectorConfig):
    """n x n queries, one for each window of stride x stride patches; as wide as the decoder."""

    name: str = "resampler"
    heads: int | None = None  # None: one per 128 channels
    # Whether keys have the positions of their own grid; otherwise those of the queries, resized bicubically (Qwen-VL).
    adaptive: bool = True

    def head_count(self, model: VlmConfig) -> int:
        return self.heads or max(1, model.decoder.hidden_size // 128)

    def check_model(self, model: VlmConfig) -> None:
        width, heads = model.decoder.hidden_size, self.head_count(model)
        check(width % heads == 0, f"projector.heads = {heads} does not divide the decoder's width {width}; set another")
        check(
            width % 4 == 0,
            f"projector 'resampler': text.hidden_size = {width} is not divisible by 4, which 2-D sine positions need",
        )

    def flops_per_tile(self, model: VlmConfig) -> float:
        """Without the queries' own projection, which all tiles share."""
        patches, cells, width = model.encoder.grid**2, model.cells_per_tile, model.decoder.hidden_size
        keys_values = patches * (model.encoder.hidden_size * width + 2 * width**2)
        return 2 * (keys_values + 2 * cells * patches * width + 2 * cells * width**2)


class Resampler(nnx.Module):
    def __init__(self, config: ResamplerConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, width = model.encoder.hidden_size, model.decoder.hidden_size
        self.query = nnx.Param(_init(rngs.params(), (model.cells_per_tile, width)))
        if vision != width:
            self.kv_proj = linear(vision, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.ln_q = LayerNorm(width, eps=EPS)
        self.ln_kv = LayerNorm(width, eps=EPS)
        self.attn = MultiHeadAttention(width, width, config.head_count(model), out_init=_init, dtype=dtype, rngs=rngs)
        self.ln_post = LayerNorm(width, eps=EPS)
        self.proj = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=normal(width**-0.5))
        self.side, self.adaptive, self.dtype = model.cells_per_side, config.adaptive, dtype

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        *batch, cells, patches, width = features.shape
        grid = round((cells * patches) ** 0.5)
        positions = self.key_positions(grid, grid)[raster_order(grid, round(patches**0.5))]
        tokens = self.resample(features.reshape(-1, cells * patches, width), positions)
        return tokens.reshape(*batch, *tokens.shape[1:])

    def resample(self, patches: Float[Array, "M P Dv"], positions: Float[np.ndarray, "P Dt"]) -> Float[Array, "M Q Dt"]:
        """Patches in any order, `positions` in the same."""
        return self.proj(self.ln_post(self.attend(self.keys_values(patches), positions)))

    def keys_values(self, patches: Float[Array, "M P Dv"]) -> Float[Array, "M P Dt"]:
        return self.ln_kv(self.kv_proj(patches) if hasattr(self, "kv_proj") else patches)

    def attend(self, values: Float[Array, "M P Dt"], positions: Float[np.ndarray, "P Dt"]) -> Float[Array, "M Q Dt"]:
        query = self.ln_q(self.query[...].astype(self.dtype))
        q = self.attn.q(query + jnp.asarray(self.query_positions, self.dtype))
        k, v = self.attn.k(values + jnp.asarray(positions, self.dtype)), self.attn.v(values)
        q, k, v = (split_heads(x, self.attn.heads) for x in (jnp.broadcast_to(q, (len(k), *q.shape)), k, v))
        return self.attn.out(merge_heads(jax.nn.dot_product_attention(q, k, v)))

    @property
    def query_positions(self) -> Float[np.ndarray, "Q Dt"]:
        return sine_positions(self.side, self.side, self.query.shape[-1])

    def key_positions(self, rows: int, columns: int) -> Float[np.ndarray, "P Dt"]:
        """Positions of a grid of patches, row by row."""
        width = self.query.shape[-1]
        if self.adaptive:
            return sine_positions(rows, columns, width)
        queries = self.query_positions.reshape(self.side, self.side, width)
        resized = np.einsum("hi,wj,ijd->hwd", bicubic(self.side, rows), bicubic(self.side, columns), queries)
        return resized.reshape(rows * columns, width).astype(np.float32)


def sine_positions(rows: int, columns: int, width: int) -> Float[np.ndarray, "rows*columns width"]:
    """Half of the channels for the column, half for the row, each [sin(p w_k), cos(p w_k)], w_k = 10000^(-4k/width)."""
    frequency = 1e4 ** (-np.arange(width // 4) / (width // 4))

    def one_axis(positions: np.ndarray) -> np.ndarray:
        angle = positions[..., None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

    row, column = np.indices((rows, columns))
    both = np.concatenate([one_axis(column), one_axis(row)], axis=-1)
    return both.reshape(rows * columns, width).astype(np.float32)


def bicubic(inputs: int, outputs: int) -> Float[np.ndarray, "outputs inputs"]:
    """Weights of torch's bicubic `interpolate` along one axis: a = -0.75, no antialias, pixel centres, edges repeated.

    (`jax.image.resize` has a = -0.5.)"""
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
