from vr_jax.kernels.window_attention.api import BackendError, window_attention, window_weights

__all__ = ["BackendError", "window_attention", "window_weights"]
