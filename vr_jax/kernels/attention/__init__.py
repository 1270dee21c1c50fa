"""Attention over packed rows, over the tiles of the encoder, and over the cache of a decoder."""

from vr_jax.kernels.attention.api import attention, full_attention
from vr_jax.kernels.attention.cached import cached_attention

__all__ = ["attention", "cached_attention", "full_attention"]
