"""Which positions are targets."""

import jax.numpy as jnp
import numpy as np

from vr_jax.kernels.cross_entropy import next_token_targets


def test_targets_stay_inside_their_sample():
    targets, mask = next_token_targets(
        tokens=jnp.asarray([[10, 11, 12, 20, 21, 22, 0, 0]]),
        segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0]]),
        loss_mask=jnp.asarray([[1, 0, 1, 1, 1, 0, 0, 1]], bool),
    )
    predicted = {int(p): int(targets[0, p]) for p in np.flatnonzero(mask[0])}
    # The first token of a sample has no predecessor in it, and padding is never a target.
    assert predicted == {1: 12, 3: 21}
