"""Cross-entropy from all logits at once; it defines what the chunked form computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    hidden: Float[Array, "B N D"], kernel: Float[Array, "D V"], targets: Int[Array, "B N"], mask: Bool[Array, "B N"]
) -> Float[Array, ""]:
    """Computes the cross-entropy of the masked positions, summed, in float32 (float64 for float64 arrays).

    Args:
        hidden: Hidden states after the final norm.
        kernel: The language model head.
        targets: The token that each position predicts.
        mask: The positions that enter the loss.

    Returns:
        The sum over the masked positions in nats.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("bnd,dv->bnv", hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0] * mask)
