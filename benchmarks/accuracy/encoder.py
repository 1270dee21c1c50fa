"""Stage 1: the encoder learns to read, patch by patch and without compression, as SigLIP brings its own pretraining.

A linear head on every patch names the question that the patch answers (both addresses), the answer, and where
the patch lies. Hundreds of steps suffice, where learning the same through a decoder plateaus
for thousands; and linear heads make the features what an average mixes up: one thing per patch."""

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
EMPTY_WEIGHT = 0.1  # of patches without a mark, which are most
FORWARD_BATCH = 50  # images at a time where nothing is trained


class PatchReader(nnx.Module):
    """SigLIP and the heads: (first, second, answer) over the parts, patch row, patch column, highlighted."""

    def __init__(self, setting: Setting, *, rngs: nnx.Rngs):
        grid, dtype, kept = setting.page.grid, jnp.dtype(setting.dtype), setting.kept_levels
        self.vision = Siglip(setting.vision, stride=1, bounds=(0, *kept), dtype=dtype, rngs=rngs)
        self.classes = (len(PARTS),) * 3 + (grid, grid, 2)
        self.head = linear(setting.vision.hidden_size, sum(self.classes), dtype=dtype, rngs=rngs)
        self.levels = kept
        self.cache_dtype = jnp.float16 if dtype == jnp.float32 else dtype

    def hidden_states(self, pixels: UInt8[Array, "B H W 3"]) -> tuple[Float[Array, "B patches Dv"], ...]:
        """At the kept levels, raster order."""
        return tuple(level[..., 0, :] for level in self.vision(pixels, self.levels))

    def __call__(self, pixels: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B patches classes"]]:
        """Logits of each head, float32."""
        logits = self.head(self.vision.post_norm(self.hidden_states(pixels)[-1])).astype(jnp.float32)
        return jnp.split(logits, np.cumsum(self.classes)[:-1], axis=-1)


def patch_loss(model: PatchReader, data: dict[str, Array], numbers: Int[Array, " batch"]) -> Float[Array, ""]:
    parts = data["parts"][numbers]
    weight = jnp.where(parts[..., 0] > 0, 1.0, EMPTY_WEIGHT)
    place = jnp.divmod(jnp.arange(parts.shape[1]), model.encoder.config.grid)
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
    trainer: Trainer[PatchReader] = Trainer(patch_loss, setting.encoder)
    arrays = {name: jnp.asarray(getattr(data, name)) for name in ("pixels", "parts", "highlighted")}
    return trainer.train(PatchReader(setting, rngs=nnx.Rngs(seed)), arrays, len(data), seed=seed, log=log)


def answer_accuracy(model: PatchReader, data: Dataset) -> float:
    """Share of marked patches whose answer head is right."""
    predict = jax.jit(lambda pixels: model(pixels)[2].argmax(-1))
    predicted = np.concatenate([predict(part) for part in _parts(data.pixels)])
    marked = data.parts[..., 0] > 0
    return float((predicted == data.parts[..., 2])[marked].mean())


def encode(model: PatchReader, data: Dataset) -> Cached:
    """Hidden states of all images at the kept levels, in 16 bits."""
    forward = jax.jit(lambda pixels: [level.astype(model.cache_dtype) for level in model.hidden_states(pixels)])
    parts = [[np.asarray(level) for level in forward(part)] for part in _parts(data.pixels)]
    return {level: np.concatenate([part[i] for part in parts]) for i, level in enumerate(model.levels)}


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[start : start + FORWARD_BATCH] for start in range(0, len(pixels), FORWARD_BATCH)]
