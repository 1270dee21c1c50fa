"""Windowed cross-attention: one query per window attends to the keys of that window, in several heads."""

from vr_jax.kernels.window_attention.api import window_attention, window_weights

__all__ = ["window_attention", "window_weights"]
