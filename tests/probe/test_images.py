"""Images are read into full batches, and those that cannot be read are named."""

import numpy as np
from PIL import Image

from vr_jax.model.config import single_tile
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.images import Reader


def test_batches_are_full_and_in_order_and_unreadable_images_are_named(folder):
    data = tiny_imagenet.read(folder)
    cut = folder / data.val[1].name
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / data.val[2].name).unlink()
    reader = Reader(folder, single_tile(32), workers=3)
    order = np.arange(len(data.val))[::-1]
    batches = list(reader.batches(data.val, 5, order))
    assert [batch.pixels.shape for batch in batches] == [(5, 32, 32, 3)] * 3
    weights = np.concatenate([batch.weights for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(weights, [1] * 9 + [0, 0, 1] + [0] * 3)
    np.testing.assert_array_equal(labels[weights > 0], [data.val[i].label for i in order if i not in (1, 2)])
    with Image.open(folder / data.val[11].name) as image:
        expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(batches[0].pixels[0], expected)
    assert reader.unreadable.keys() == {data.val[1].name, data.val[2].name}
    assert reader.unreadable[data.val[1].name].startswith("broken_image: ")
    assert reader.unreadable[data.val[2].name].startswith("missing_image: ")


def test_grey_images_become_three_equal_channels(generated):
    data = tiny_imagenet.read(generated)
    (grey,) = [p for p in data.train if p.name.endswith("n10000000_49.JPEG")]
    (batch,) = Reader(generated, single_tile(64)).batches([grey], 1)
    assert batch.weights.tolist() == [1]
    assert np.ptp(batch.pixels[0].astype(int), axis=-1).max() == 0
