"""The training loop that every stage of the comparison uses. One call runs many steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.accuracy.settings import Schedule

CHUNK = 25  # Steps per call. The dispatch of one call costs as much as a small step.

# Maps (model, data, numbers of the batch's examples) to the loss.
Loss = Callable[[Any, Any, Int[Array, " batch"]], Float[Array, ""]]


class Trainer[Model: nnx.Module]:
    """Trains modules with one loss and one schedule.

    It is compiled once for all seeds of a system, because modules of equal structure share the compilation.
    """

    def __init__(self, loss: Loss, schedule: Schedule):
        """Builds the optimizer of the schedule."""
        self.schedule = schedule
        self.optimizer = _optimizer(schedule)
        self._loss = loss
        self._chunk = jax.jit(self._run_chunk, donate_argnums=(0, 1))

    def _run_chunk(
        self, model: Model, state: optax.OptState, data: Any, numbers: Int[Array, "steps batch"]
    ) -> tuple[Model, optax.OptState, Float[Array, " steps"]]:
        def step(carry, batch):
            model, state = carry
            loss, gradient = jax.value_and_grad(self._loss)(model, data, batch)
            updates, state = self.optimizer.update(gradient, state, model)
            return (optax.apply_updates(model, updates), state), loss

        (model, state), losses = jax.lax.scan(step, (model, state), numbers)
        return model, state, losses

    def train(
        self, model: Model, data: Any, examples: int, *, seed: int, log: Callable[[str], None] | None = None
    ) -> Model:
        """Trains a model for the whole schedule.

        The order of the examples is a function of the seed alone, so all systems see the same batches.

        Args:
            model: The initial model, whose arrays are donated.
            data: The data that the loss reads.
            examples: The number of examples in `data`.
            seed: The seed of the order.
            log: Called with a line of progress after every chunk of steps.

        Returns:
            The trained model.
        """
        state = self.optimizer.init(model)
        order = _batches(examples, self.schedule, seed)
        start, done = time.perf_counter(), 0
        for numbers in np.array_split(order, max(1, len(order) // CHUNK)):
            model, state, losses = self._chunk(model, state, data, jnp.asarray(numbers))
            done += len(numbers)
            seconds = (time.perf_counter() - start) / done
            if log is not None:
                log(f"step {done}/{len(order)}  loss {float(losses.mean()):.4f}  {seconds:.3f} s/step")
        return model


def _optimizer(schedule: Schedule) -> optax.GradientTransformation:
    def rate(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, schedule.steps // 20), max(2, schedule.steps))

    if schedule.muon:
        update = optax.contrib.muon(
            rate(10 * schedule.learning_rate),
            adam_learning_rate=rate(schedule.learning_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        update = optax.adamw(rate(schedule.learning_rate), b2=0.98, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def _matrices(model: nnx.Module) -> Any:
    """Marks the kernels, which Muon orthogonalises; where a stage stacks layers, each layer for itself."""

    def dimensions(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, model)


def _batches(examples: int, schedule: Schedule, seed: int) -> Int[np.ndarray, "steps batch"]:
    """The examples of every step: epochs over all examples, each shuffled anew."""
    rng = np.random.default_rng(seed)

    def epochs() -> Iterator[np.ndarray]:
        needed = schedule.steps * schedule.batch
        while needed > 0:
            yield rng.permutation(examples)[:needed]
            needed -= examples

    return np.concatenate(list(epochs())).reshape(schedule.steps, schedule.batch).astype(np.int32)
