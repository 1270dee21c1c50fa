"""Training of the probe's heads: all of them learn side by side from one frozen forward pass per batch."""

from __future__ import annotations

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

from vr_jax.errors import UserError
from vr_jax.model.batch import Batch
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.probe.head import ProbeHead, logits_of, make_heads
from vr_jax.probe.images import ImageBatch, Reader
from vr_jax.probe.taps import Tap, tapped_tokens
from vr_jax.probe.tiny_imagenet import LabelledImage, TinyImageNet
from vr_jax.settings import ProbeSettings
from vr_jax.sharding import batch_sharding, batch_shards, replicated

# The heads by the name of their tap. Every parameter has a leading axis for the seeds.
Heads = dict[str, ProbeHead]
Tokens = Mapping[str, Float[Array, "B T D"]]
# These fields of `ProbeSettings` decide how the heads are trained.
HEAD_SETTINGS = ("width", "heads", "lr", "weight_decay", "epochs", "batch_size", "seeds", "data_seed")


@dataclass(frozen=True)
class Fit:
    """The trained heads and their results by the name of the tap, with S seeds each.

    Attributes:
        correct: The number of validation images that each head classifies correctly.
        losses: The mean cross-entropy of each head in the last epoch of the training, in nats.
        shapes: The number of tokens and the width of each tap.
        heads: The heads.
    """

    correct: dict[str, Int[np.ndarray, " S"]]
    losses: dict[str, Float[np.ndarray, " S"]]
    shapes: dict[str, tuple[int, int]]
    heads: Heads


def fit(
    model: VisionLanguageModel,
    prompt: Batch,
    taps: Sequence[Tap],
    reader: Reader,
    data: TinyImageNet,
    settings: ProbeSettings,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> Fit:
    """Trains the heads with AdamW and a cosine schedule to 0, and classifies the validation images.

    It runs under `jax.set_mesh(mesh)`. The images of a batch are divided over the axes replica and fsdp, and every
    device has all heads. Images that cannot be read are listed in `reader.unreadable`; such a validation image counts
    as wrong.

    Args:
        model: The frozen model.
        prompt: The question about an image, as `prompt_batch` returns it.
        taps: The places whose tokens are classified.
        reader: Reads the images.
        data: The training and validation images.
        settings: The settings of the heads and of their training.
        mesh: The devices.
        progress: Whether a progress bar is shown.

    Raises:
        UserError: The mesh cannot divide a batch, no training image can be read, or a loss is not finite.
    """
    if settings.batch_size % batch_shards(mesh):
        raise UserError(
            f"batch_size = {settings.batch_size} is not divisible by {batch_shards(mesh)}, the number of parts into "
            "which the mesh divides a batch; choose a multiple of it."
        )
    tokens_of = jax.jit(lambda model, prompt, pixels: tapped_tokens(model, prompt, pixels, taps))
    steps_per_epoch = -(-len(data.train) // settings.batch_size)
    schedule = optax.cosine_decay_schedule(settings.lr, settings.epochs * steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    whole = replicated(mesh)
    update = jax.jit(_update(optimizer), donate_argnums=(0, 1), out_shardings=(whole, whole, whole))
    count = jax.jit(count_correct, out_shardings=whole)

    pixels = jax.ShapeDtypeStruct((settings.batch_size, *(reader.image.tile_size,) * 2, 3), jnp.uint8)
    shapes = {name: x.shape[1:] for name, x in jax.eval_shape(tokens_of, model, prompt, pixels).items()}

    def init() -> tuple[Heads, optax.OptState]:
        seeds = jnp.arange(settings.seeds)
        heads = {
            name: make_heads(features, len(data.classes), seeds, width=settings.width, heads=settings.heads)
            for name, (_, features) in shapes.items()
        }
        return heads, optimizer.init(heads)  # type: ignore[arg-type]  # optax's type of parameters omits modules.

    heads, state = jax.jit(init, out_shardings=whole)()
    zeros = jax.device_put(({name: jnp.zeros(settings.seeds) for name in shapes}, jnp.zeros(())), whole)
    losses: dict[str, Float[np.ndarray, " S"]] = {}
    steps = settings.epochs * steps_per_epoch + -(-len(data.val) // settings.batch_size)
    with tqdm(total=steps, unit="batch", dynamic_ncols=True, disable=not progress) as bar:

        def batches(images: Sequence[LabelledImage], order: Any = None) -> Iterator[tuple[Tokens, Array, Array]]:
            for batch in reader.batches(images, settings.batch_size, order):
                pixels, labels, weights = _on_mesh(batch, mesh)
                yield tokens_of(model, prompt, pixels), labels, weights
                bar.update()

        for epoch in range(settings.epochs):
            bar.set_description_str(f"epoch {epoch + 1}/{settings.epochs}")
            order = np.random.default_rng((settings.data_seed, epoch)).permutation(len(data.train))
            sums = zeros
            for tokens, labels, weights in batches(data.train, order):
                heads, state, sums = update(heads, state, sums, tokens, labels, weights)
            losses = _mean_losses(sums, epoch)
            bar.set_postfix_str(f"best loss {min(map(np.min, losses.values())):.3f}")
        bar.set_description_str("validation")
        correct = {name: np.zeros(settings.seeds, np.int64) for name in shapes}
        for tokens, labels, weights in batches(data.val):
            for name, counted in count(heads, tokens, labels, weights).items():
                correct[name] += np.asarray(counted)
    return Fit(correct, losses, shapes, heads)


def loss_of(
    heads: Heads, tokens: Tokens, labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, " S"]]]:
    """Computes the cross-entropy of every head.

    Args:
        heads: The heads by tap.
        tokens: The tokens by tap.
        labels: The classes of the images.
        weights: 1 for an image, and 0 for one that is missing.

    Returns:
        The sum of the losses of all heads, which share no parameter, and the losses of each tap.
    """

    def one(stacked: ProbeHead, x: Float[Array, "B T D"]) -> Float[Array, " S"]:
        each = optax.softmax_cross_entropy_with_integer_labels(logits_of(stacked, x), labels[None])
        return jnp.sum(each * weights, axis=-1) / jnp.maximum(jnp.sum(weights), 1.0)

    losses = {name: one(stacked, tokens[name]) for name, stacked in heads.items()}
    return sum(map(jnp.sum, losses.values()), start=jnp.zeros(())), losses


def _update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns a function that updates the heads and adds the losses of a batch to the sums of the epoch."""

    def update(
        heads: Heads, state: optax.OptState, sums: Any, tokens: Tokens, labels: Array, weights: Array
    ) -> tuple[Heads, optax.OptState, Any]:
        grads, losses = jax.grad(loss_of, has_aux=True)(heads, tokens, labels, weights)
        updates, state = optimizer.update(grads, state, heads)  # type: ignore[arg-type]  # As above.
        used = jnp.sum(weights)
        parts = ({name: loss * used for name, loss in losses.items()}, used)
        return optax.apply_updates(heads, updates), state, jax.tree.map(jnp.add, sums, parts)  # type: ignore[return-value, arg-type]  # As above.

    return update


def count_correct(
    heads: Heads, tokens: Tokens, labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> dict[str, Int[Array, " S"]]:
    """Counts the images that each head classifies correctly; an image of weight 0 never counts."""

    def one(stacked: ProbeHead, x: Float[Array, "B T D"]) -> Int[Array, " S"]:
        right = jnp.argmax(logits_of(stacked, x), axis=-1) == labels[None]
        return jnp.sum(right & (weights > 0), axis=-1)

    return {name: one(stacked, tokens[name]) for name, stacked in heads.items()}


def _mean_losses(sums: Any, epoch: int) -> dict[str, Float[np.ndarray, " S"]]:
    """Divides the sums of an epoch by its number of images."""
    totals, used = jax.device_get(sums)
    if used == 0:
        raise UserError("Not one training image can be read; check that the folder --data is intact.")
    losses = {name: np.asarray(total / used) for name, total in totals.items()}
    broken = [name for name, loss in losses.items() if not np.all(np.isfinite(loss))]
    if broken:
        raise UserError(
            f"In epoch {epoch + 1} the loss at {', '.join(broken)} is not finite; try a lower learning rate (--lr)."
        )
    return losses


def _on_mesh(batch: ImageBatch, mesh: Mesh) -> tuple[Array, Array, Array]:
    """Divides a batch over the devices."""
    where = batch_sharding(mesh)
    return (
        jax.device_put(batch.pixels, where),
        jax.device_put(batch.labels, where),
        jax.device_put(batch.weights, where),
    )
