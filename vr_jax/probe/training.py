"""Trains all heads side by side on what one frozen forward pass yields, and counts their right answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from vr_jax.model.batch import Batch
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.head import ProbeHead, logits_of, make_heads
from vr_jax.probe.images import ImageBatch, Reader
from vr_jax.probe.taps import Tap, tapped_tokens
from vr_jax.probe.tiny_imagenet import LabelledImage
from vr_jax.sharding import batch_sharding, batch_shards, replicated

Heads = dict[str, ProbeHead]  # by tap; every parameter has a leading axis of seeds
Tokens = Mapping[str, Float[Array, "B T D"]]
PerSeed = dict[str, Float[np.ndarray, " S"]]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The heads and their training: AdamW with a cosine to 0. Raises ProbeError for numbers that make no sense."""

    width: int = 512  # of the query and the attention; the same at every tap
    heads: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01  # torch's default of AdamW; decoupled, on all parameters
    epochs: int = 15
    batch_size: int = 256  # images, over all devices
    seeds: int = 3  # heads per tap, which differ in their initial weights and see the same batches
    data_seed: int = 0  # of the subset and of the order of the images

    def __post_init__(self):
        for name in ("width", "heads", "epochs", "batch_size", "seeds"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProbeError(f"{name} = {value!r}: expected an integer of at least 1")
        if self.width % self.heads:
            raise ProbeError(f"width = {self.width} is not divisible by heads = {self.heads}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ProbeError(f"lr = {self.lr}, weight_decay = {self.weight_decay}: expected lr > 0, weight_decay >= 0")


@dataclass(frozen=True)
class Fit:
    """What came of the heads, by tap and seed. shapes: (tokens, width) of each tap."""

    correct: dict[str, Int[np.ndarray, " S"]]  # of all validation images
    losses: PerSeed  # mean cross-entropy in the last epoch of training, nats
    shapes: dict[str, tuple[int, int]]
    heads: Heads


def fit(
    model: VisionLanguageModel,
    prompt: Batch,
    taps: Sequence[Tap],
    reader: Reader,
    train: Sequence[LabelledImage],
    val: Sequence[LabelledImage],
    classes: int,
    options: FitOptions,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> Fit:
    """Runs under `jax.set_mesh(mesh)`; batches are cut over (replica, fsdp), heads are whole on every device.

    Images that cannot be read are left to `reader.unreadable`; a validation image among them counts as wrong.
    Raises ProbeError for a batch that the mesh cannot cut, when no training image can be read, or when a loss is
    no number."""
    if options.batch_size % batch_shards(mesh):
        raise ProbeError(
            f"batch_size = {options.batch_size} is not divisible by the mesh's {batch_shards(mesh)} data shards"
        )
    tokens_of = jax.jit(lambda model, prompt, pixels: tapped_tokens(model, prompt, pixels, taps))
    steps_per_epoch = -(-len(train) // options.batch_size)
    schedule = optax.cosine_decay_schedule(options.lr, options.epochs * steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=options.weight_decay)
    whole = replicated(mesh)
    update = jax.jit(_update(optimizer), donate_argnums=(0, 1), out_shardings=(whole, whole, whole))
    count = jax.jit(_count, out_shardings=whole)

    pixels = jax.ShapeDtypeStruct((options.batch_size, *(reader.image.tile_size,) * 2, 3), jnp.uint8)
    shapes = {name: x.shape[1:] for name, x in jax.eval_shape(tokens_of, model, prompt, pixels).items()}

    def init() -> tuple[Heads, optax.OptState]:
        seeds = jnp.arange(options.seeds)
        heads = {
            name: make_heads(features, classes, seeds, width=options.width, heads=options.heads)
            for name, (_, features) in shapes.items()
        }
        return heads, optimizer.init(heads)  # type: ignore[arg-type]

    heads, state = jax.jit(init, out_shardings=whole)()
    zeros = jax.device_put(({name: jnp.zeros(options.seeds) for name in shapes}, jnp.zeros(())), whole)
    losses: PerSeed = {}
    steps = options.epochs * steps_per_epoch + -(-len(val) // options.batch_size)
    with tqdm(total=steps, unit="batch", dynamic_ncols=True, disable=not progress) as bar:

        def batches(images: Sequence[LabelledImage], order: Any = None) -> Iterator[tuple[Tokens, Array, Array]]:
            for batch in reader.batches(images, options.batch_size, order):
                pixels, labels, weights = _on_mesh(batch, mesh)
                yield tokens_of(model, prompt, pixels), labels, weights
                bar.update()

        for epoch in range(options.epochs):
            bar.set_description_str(f"epoch {epoch + 1}/{options.epochs}")
            order = np.random.default_rng((options.data_seed, epoch)).permutation(len(train))
            sums = zeros
            for tokens, labels, weights in batches(train, order):
                heads, state, sums = update(heads, state, sums, tokens, labels, weights)
            losses = _mean_losses(sums, epoch)
            bar.set_postfix_str(f"loss {min(map(np.min, losses.values())):.3f} at best")
        bar.set_description_str("validation")
        correct = {name: np.zeros(options.seeds, np.int64) for name in shapes}
        for tokens, labels, weights in batches(val):
            for name, counted in count(heads, tokens, labels, weights).items():
                correct[name] += np.asarray(counted)
    return Fit(correct, losses, shapes, heads)


def loss_of(
    heads: Heads, tokens: Tokens, labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, " S"]]]:
    """The sum over all heads, which share no parameter, of their mean cross-entropies; and each head's own."""

    def one(stacked: ProbeHead, x: Float[Array, "B T D"]) -> Float[Array, " S"]:
        each = optax.softmax_cross_entropy_with_integer_labels(logits_of(stacked, x), labels[None])
        return jnp.sum(each * weights, axis=-1) / jnp.maximum(jnp.sum(weights), 1.0)

    losses = {name: one(stacked, tokens[name]) for name, stacked in heads.items()}
    return sum(map(jnp.sum, losses.values()), start=jnp.zeros(())), losses


def _update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def update(heads, state, sums, tokens, labels, weights):
        grads, losses = jax.grad(loss_of, has_aux=True)(heads, tokens, labels, weights)
        updates, state = optimizer.update(grads, state, heads)
        used = jnp.sum(weights)
        parts = ({name: loss * used for name, loss in losses.items()}, used)
        return optax.apply_updates(heads, updates), state, jax.tree.map(jnp.add, sums, parts)

    return update


def _count(heads: Heads, tokens: Tokens, labels: Array, weights: Array) -> dict[str, Int[Array, " S"]]:
    def one(stacked: ProbeHead, x: Array) -> Array:
        right = jnp.argmax(logits_of(stacked, x), axis=-1) == labels[None]
        return jnp.sum(right & (weights > 0), axis=-1)

    return {name: one(stacked, tokens[name]) for name, stacked in heads.items()}


def _mean_losses(sums: Any, epoch: int) -> PerSeed:
    totals, used = jax.device_get(sums)
    if used == 0:
        raise ProbeError("not one training image can be read; is --data intact?")
    losses = {name: np.asarray(total / used) for name, total in totals.items()}
    broken = [name for name, loss in losses.items() if not np.all(np.isfinite(loss))]
    if broken:
        raise ProbeError(f"epoch {epoch + 1}: the loss at {', '.join(broken)} is no finite number; try a lower --lr")
    return losses


def _on_mesh(batch: ImageBatch, mesh: Mesh) -> tuple[Array, Array, Array]:
    where = batch_sharding(mesh)
    return (
        jax.device_put(batch.pixels, where),
        jax.device_put(batch.labels, where),
        jax.device_put(batch.weights, where),
    )
