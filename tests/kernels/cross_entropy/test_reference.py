"""The reference against the definition of cross-entropy, position by position."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.cross_entropy.cases import problem
from tests.noise import float64
from vr_jax.kernels.cross_entropy import reference


def test_it_equals_the_definition():
    hidden, kernel, targets, mask = (np.asarray(x) for x in problem())
    hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
    total = 0.0
    for row, position in zip(*np.nonzero(mask), strict=True):
        logits = hidden[row, position] @ kernel
        total -= logits[targets[row, position]] - np.log(np.sum(np.exp(logits)))
    with float64():
        # The noise of float64 is about 1e-14, relative to the sum.
        found = reference.cross_entropy(*map(jnp.asarray, (hidden, kernel, targets, mask)))
        np.testing.assert_allclose(found, total, rtol=1e-12)
