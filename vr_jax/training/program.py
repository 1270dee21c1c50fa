"""From a recipe to the jitted update and the state it works on: for the loop, for export, for the planner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vr_jax.errors import ConfigError
from vr_jax.model.batch import Batch, BatchShape, batch_structs
from vr_jax.model.config import VlmConfig
from vr_jax.sharding import batch_sharding
from vr_jax.training.optimizer import OptimizerConfig, Schedule, make_optimizer, make_schedule
from vr_jax.training.state import ModelTree, TrainState, abstract_state
from vr_jax.training.step import TrainStep, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """What a recipe runs on a mesh. `step` is to be called under `jax.set_mesh(mesh)`, with a state laid out as
    `abstract` and a batch as `abstract_batch`."""

    model: VlmConfig
    mesh: Mesh
    tree: ModelTree
    trainable: tuple[str, ...]  # parameter paths, in model order
    schedule: Schedule
    optimizer: optax.GradientTransformation
    abstract: TrainState
    step: TrainStep


@dataclass(frozen=True)
class Parts:
    """What of a TrainProgram is known before the data are, and with them the number of updates."""

    config: ConfigDict
    model: VlmConfig
    mesh: Mesh
    tree: ModelTree
    trainable: tuple[str, ...]

    def program(self, total_steps: int) -> TrainProgram:
        """total_steps: where the learning rate ends. Raises OptimizerError."""
        config = self.config
        settings = OptimizerConfig(**config.optimizer.to_dict())
        schedule = make_schedule(settings, total_steps)
        optimizer = make_optimizer(settings, schedule, self.trainable)
        abstract = abstract_state(self.tree, optimizer, self.trainable, self.mesh, config.frozen_dtype)
        step = make_train_step(
            self.tree,
            optimizer,
            schedule,
            abstract,
            accumulation=config.batch.accumulation,
            loss_chunk=config.loss_chunk,
        )
        return TrainProgram(self.model, self.mesh, self.tree, self.trainable, schedule, optimizer, abstract, step)


def parts_of(config: ConfigDict, mesh: Mesh) -> Parts:
    """Raises ConfigError, TrainableError or ShardingError for a recipe that cannot work on this mesh."""
    if config.loss_chunk < 1:
        raise ConfigError(f"config.loss_chunk = {config.loss_chunk}: expected a positive number of positions")
    model = VlmConfig.from_dict(config.model.to_dict())
    tree = ModelTree(model)
    return Parts(config, model, mesh, tree, tuple(tree.trainable(config.trainable)))


def build_program(config: ConfigDict, mesh: Mesh, total_steps: int) -> TrainProgram:
    """A recipe's program with a learning rate that ends at `total_steps`. Allocates nothing, compiles nothing.

    Raises ConfigError, TrainableError, OptimizerError or ShardingError for a recipe that cannot work."""
    return parts_of(config, mesh).program(total_steps)


def total_steps(config: ConfigDict, samples: int) -> int:
    """Updates of a run whose epoch has `samples` samples."""
    return config.steps or max(1, math.ceil(config.epochs * samples / config.samples_per_step))


def abstract_batch(config: ConfigDict, mesh: Mesh, model: VlmConfig) -> Batch:
    """Shapes, types and shardings of the global batch of one update, without arrays."""
    shape = BatchShape(
        rows=config.batch.rows, tokens=config.batch.tokens, tiles=config.batch.tiles, tile_size=model.image.tile_size
    )
    return batch_structs(shape, batch_sharding(mesh), weighted_cells=model.image.may_interpolate)
