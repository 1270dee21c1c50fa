"""AdamW with warm-up, cosine decay, clipping and optional learning rates per parameter group (methods.md 1.6)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import jax
import optax
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


class OptimizerError(ValueError):
    """Optimizer settings that cannot be meant; one line for the user."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Defaults are those of LLaVA-NeXT's scripts (Hugging Face's Trainer)."""

    lr: float  # at the end of the warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to 0 at the last step
    warmup_ratio: float = 0.03  # of all steps, rounded up; linear from 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # never on biases and norms
    clip_norm: float = 1.0  # of the global gradient norm
    # (glob of parameter paths, its learning rate), e.g. (("encoder.*", 2e-6),); the first match counts.
    lr_groups: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for name, value, low, high in (
            ("lr", self.lr, 0, math.inf),
            ("clip_norm", self.clip_norm, 0, math.inf),
            ("eps", self.eps, 0, math.inf),
        ):
            if not low < value < high:
                raise OptimizerError(f"optimizer.{name} = {value}: expected a finite number above {low}")
        if not 0 <= self.warmup_ratio < 1:
            raise OptimizerError(f"optimizer.warmup_ratio = {self.warmup_ratio}: expected a share in [0, 1)")
        if self.schedule not in ("cosine", "constant"):
            raise OptimizerError(f"optimizer.schedule = {self.schedule!r}: expected 'cosine' or 'constant'")
        if self.weight_decay < 0:
            raise OptimizerError(f"optimizer.weight_decay = {self.weight_decay}: expected a number >= 0")


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether a parameter path matches one of the globs (`*` crosses dots)."""
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def decays(path: str) -> bool:
    """Weight decay spares biases and norms, as Hugging Face's Trainer does."""
    return not path.endswith((".bias", ".scale"))


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Learning rate of the update numbered `step` (0 for the first), as transformers' cosine schedule with warm-up."""
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if config.schedule == "constant":
        decay = optax.constant_schedule(config.lr)
    else:
        decay = optax.cosine_decay_schedule(config.lr, max(1, total_steps - warmup))
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, schedule: Schedule, paths: Iterable[str]) -> optax.GradientTransformation:
    """The optimizer of a dict path -> parameter with the keys `paths`.

    Raises OptimizerError for a learning-rate group that matches no trainable parameter."""
    paths = list(paths)
    for glob, _ in config.lr_groups:
        if not any(matches(path, [glob]) for path in paths):
            raise OptimizerError(f"optimizer.lr_groups: {glob!r} matches no trainable parameter")
    factors = {
        path: next((lr for glob, lr in config.lr_groups if matches(path, [glob])), config.lr) / config.lr
        for path in paths
    }

    def scale_groups(updates, params=None):
        del params
        return {path: update * factors[path] for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda p: {path: decays(path) for path in p}),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(schedule),
    )


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, jax.sharding.NamedSharding],
    other: jax.sharding.NamedSharding,
) -> optax.OptState:
    """Shardings of the optimizer's state: moments lie as their parameters do, counters as `other`."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: other
    )
