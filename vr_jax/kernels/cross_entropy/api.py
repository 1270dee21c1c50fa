"""Next-token cross-entropy whose logits never exist for a whole batch (docs/design/decisions.md#decision-10)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vr_jax.kernels.cross_entropy import chunked


def next_token_targets(
    tokens: Int[Array, "B N"], segment_ids: Int[Array, "B N"], loss_mask: Bool[Array, "B N"]
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """Returns the token that each position predicts, and which of these predictions enter the loss.

    A target is predicted from the position before it in the same segment, so the first token of a sample is never one.
    Source: `transformers:loss/loss_utils.py`, whose labels are shifted by one position.

    Args:
        tokens: Token ids of packed rows.
        segment_ids: The sample of each token, counted from 1; 0 is padding.
        loss_mask: The tokens that are targets, as in `vr_jax.model.batch.Batch`.

    Returns:
        The target of each position, and the mask of the positions whose target counts. The last position of a row
        predicts nothing; its target is arbitrary.
    """
    same_sample = segment_ids[:, 1:] == segment_ids[:, :-1]
    mask = loss_mask[:, 1:] & same_sample & (segment_ids[:, 1:] > 0)
    return jnp.roll(tokens, -1, axis=1), jnp.pad(mask, ((0, 0), (0, 1)))


def cross_entropy(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Computes the cross-entropy of the masked positions, summed, from chunks of at most (chunk, V) logits.

    Each device reorders its positions so that the masked ones come first, and skips chunks without any. So the
    vocabulary costs as much as the device with the most targets needs. The gradients are computed together with the
    loss from the same logits, and only those that are asked for. Matrix products take the type of `hidden` (also for
    the gradient of the logits, as in torch's bfloat16) and accumulate in float32; the gradient of `kernel` is
    accumulated in float32 over all chunks.

    Args:
        hidden: Hidden states after the final norm. On a mesh, rows are divided over the batch axes.
        kernel: The language model head.
        targets: The token that each position predicts.
        mask: The positions that enter the loss.
        chunk: Positions per chunk on each device.

    Returns:
        The sum over the masked positions in nats, float32.
    """
    return chunked.cross_entropy(hidden, kernel, targets, mask, chunk, False)[0]


def cross_entropy_of_each(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "B N"]]:
    """Computes what `cross_entropy` does, and the cross-entropy of each position from the same logits.

    Args:
        hidden: Hidden states after the final norm. On a mesh, rows are divided over the batch axes.
        kernel: The language model head.
        targets: The token that each position predicts.
        mask: The positions that enter the loss.
        chunk: Positions per chunk on each device.

    Returns:
        The sum over the masked positions in nats, float32, and the part of each position, which is zero where the mask
        is False. Gradients pass through the sum alone.
    """
    total, each = chunked.cross_entropy(hidden, kernel, targets, mask, chunk, True)
    assert each is not None
    return total, each
