from vr_jax.kernels.window_attention.api import window_attention

__all__ = ["window_attention"]
