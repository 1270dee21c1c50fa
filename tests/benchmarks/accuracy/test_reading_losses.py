"""What the last stage of the decoder's training does to the vision tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy import reading_losses


def test_the_highlighted_patches_are_among_the_few_in_their_order():
    marks = np.zeros((2, 144, 2), np.int32)
    marked = np.array([[3, 70, 143], [0, 8, 9]])
    for row, places in enumerate(marked):
        marks[row, places] = 5
    cells = np.asarray(reading_losses.few_patches(jax.random.key(0), jnp.asarray(marks), 16))
    assert cells.shape == (2, 16)
    assert (np.diff(cells) > 0).all()
    assert all(set(places) <= set(row) for places, row in zip(marked, cells, strict=True))


def test_tokens_are_mixed_and_disturbed_within_their_bounds():
    """Where all tokens of a row are equal, mixing changes nothing, so that what differs is the noise alone."""
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (64, 1, 32)), (64, 16, 32))
    noise = reading_losses.disturb(tokens, jax.random.split(jax.random.key(2), 4)) - tokens
    size = np.sqrt(np.mean(noise**2, axis=(1, 2)) / np.mean(tokens**2, axis=(1, 2)))
    # The share of a row is uniform in [0, NOISE]; the sampling error of 512 normal numbers is 3 %.
    assert 0.9 * reading_losses.NOISE < size.max() < 1.15 * reading_losses.NOISE
    assert size.min() < 0.1 * reading_losses.NOISE
