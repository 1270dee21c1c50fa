from vr_jax.kernels.window_attention.api import window_attention, window_weights

__all__ = ["window_attention", "window_weights"]
