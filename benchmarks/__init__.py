"""Scripts that measure vr_jax; README.md in this folder lists them."""
