"""Next-token cross-entropy over a large vocabulary."""

from vr_jax.kernels.cross_entropy.api import cross_entropy, cross_entropy_of_each, next_token_targets

__all__ = ["cross_entropy", "cross_entropy_of_each", "next_token_targets"]
