"""Stage 1 of the comparison: the encoder learns to read, patch by patch and without compression.

It takes the place of SigLIP's pretraining. A linear head on every patch predicts the question that the patch answers
(both addresses), the answer, and the place of the patch. Hundreds of steps suffice. Learning the same through a decoder
makes no progress for thousands of steps. The linear heads also make every patch's features describe that patch alone,
which is what an average over a window mixes up.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from benchmarks.accuracy.dataset import Dataset
from benchmarks.accuracy.optimization import Trainer
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.tasks import PARTS
from vr_jax.model.encoders.siglip import Siglip
from vr_jax.model.layers import linear

Cached = dict[int, Float[np.ndarray, "count patches Dv"]]
EMPTY_WEIGHT = 0.1  # The weight in the loss of patches without a mark, which are the majority.
FORWARD_BATCH = 50  # Images at a time where nothing is trained.


class PatchReader(nnx.Module):
    """A SigLIP encoder with linear heads on every patch.

    The heads predict the three parts of the patch's mark (first, second, answer), its row, its column, and whether it
    is highlighted.
    """

    def __init__(self, setting: Setting, *, rngs: nnx.Rngs):
        """Initialises the encoder and the heads for the sizes of `setting`."""
        grid, dtype, kept = setting.page.grid, jnp.dtype(setting.dtype), setting.kept_levels
        self.vision = Siglip(setting.vision, stride=1, bounds=(0, *kept), dtype=dtype, rngs=rngs)
        self.classes = (len(PARTS),) * 3 + (grid, grid, 2)
        self.head = linear(setting.vision.hidden_size, sum(self.classes), dtype=dtype, rngs=rngs)
        self.levels = kept
        self.cache_dtype = jnp.float16 if dtype == jnp.float32 else dtype

    def hidden_states(self, pixels: UInt8[Array, "B H W 3"]) -> tuple[Float[Array, "B patches Dv"], ...]:
        """The encoder's hidden states at the kept levels, in raster order."""
        return tuple(level[..., 0, :] for level in self.vision(pixels, self.levels))

    def __call__(self, pixels: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B patches classes"]]:
        """The logits of each head, float32."""
        logits = self.head(self.vision.post_norm(self.hidden_states(pixels)[-1])).astype(jnp.float32)
        return jnp.split(logits, np.cumsum(self.classes)[:-1], axis=-1)


def patch_loss(model: PatchReader, data: dict[str, Array], numbers: Int[Array, " batch"]) -> Float[Array, ""]:
    """The sum of the heads' cross-entropies, averaged over the patches of the images `numbers` by their weights."""
    parts = data["parts"][numbers]
    weight = jnp.where(parts[..., 0] > 0, 1.0, EMPTY_WEIGHT)
    place = jnp.divmod(jnp.arange(parts.shape[1]), model.vision.config.grid)
    targets = (
        *jnp.moveaxis(parts.astype(jnp.int32), -1, 0),
        *(jnp.broadcast_to(index, parts.shape[:2]) for index in place),
        data["highlighted"][numbers].astype(jnp.int32),
    )
    losses = (
        optax.softmax_cross_entropy_with_integer_labels(logits, target)
        for logits, target in zip(model(data["pixels"][numbers]), targets, strict=True)
    )
    return sum(jnp.sum(loss * weight) for loss in losses) / jnp.sum(weight)


def train_encoder(setting: Setting, data: Dataset, *, seed: int, log: Callable[[str], None]) -> PatchReader:
    """Trains a new encoder on all images."""
    trainer: Trainer[PatchReader] = Trainer(patch_loss, setting.encoder)
    arrays = {name: jnp.asarray(getattr(data, name)) for name in ("pixels", "parts", "highlighted")}
    return trainer.train(PatchReader(setting, rngs=nnx.Rngs(seed)), arrays, len(data), seed=seed, log=log)


def answer_accuracy(model: PatchReader, data: Dataset) -> float:
    """The share of marked patches whose answer is predicted correctly."""
    predict = jax.jit(lambda pixels: model(pixels)[2].argmax(-1))
    predicted = np.concatenate([predict(part) for part in _parts(data.pixels)])
    marked = data.parts[..., 0] > 0
    return float((predicted == data.parts[..., 2])[marked].mean())


def encode(model: PatchReader, data: Dataset) -> Cached:
    """The hidden states of all images at the kept levels, in 16 bits."""
    forward = jax.jit(lambda pixels: [level.astype(model.cache_dtype) for level in model.hidden_states(pixels)])
    parts = [[np.asarray(level) for level in forward(part)] for part in _parts(data.pixels)]
    return {level: np.concatenate([part[i] for part in parts]) for i, level in enumerate(model.levels)}


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[start : start + FORWARD_BATCH] for start in range(0, len(pixels), FORWARD_BATCH)]
