"""What a run computes: the model, the optimizer, the shapes of the state and the jitted update.

Training runs it, the export reads its shapes, and the planner compiles it for devices that nobody holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import optax
from jax.sharding import Mesh

from vr_jax.errors import ConfigError
from vr_jax.fields import MAX_INT
from vr_jax.model.batch import Batch, BatchShape, batch_structs
from vr_jax.model.config import VlmConfig
from vr_jax.settings import TrainConfig
from vr_jax.sharding import ChosenMesh, batch_sharding, choose_mesh, unsharded
from vr_jax.training.adapters import adapted_tree
from vr_jax.training.optimizer import Schedule, check_groups, make_optimizer, make_schedule
from vr_jax.training.state import ModelTree, TrainState, abstract_state
from vr_jax.training.step import TrainStep, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """The computation of a run on a mesh, without any array.

    Attributes:
        model: The model's config.
        mesh: The devices.
        tree: The model's parameters.
        trainable: Paths of the trained parameters, in the model's order.
        schedule: The learning rate of an update.
        optimizer: The optimizer of the trained parameters.
        abstract: Shapes, types and shardings of the state.
        step: The jitted update. It is called under `jax.set_mesh(mesh)` with a state laid out as `abstract` and a batch
            laid out as `abstract_batch`.
    """

    model: VlmConfig
    mesh: Mesh
    tree: ModelTree
    trainable: tuple[str, ...]
    schedule: Schedule
    optimizer: optax.GradientTransformation
    abstract: TrainState
    step: TrainStep


def build_program(
    config: TrainConfig, mesh: Mesh, total_steps: int, tree: ModelTree | None = None, sources: Sequence[str] = ()
) -> TrainProgram:
    """Builds the computation of a run. Nothing is allocated or compiled.

    Args:
        config: The settings of the run.
        mesh: The devices.
        total_steps: Number of updates, after which the learning rate has decayed.
        tree: The parameters of the plain model, where the caller has them already.
        sources: The names of the sources of the samples, where the numbers of an update tell them apart.

    Raises:
        ConfigError: The model cannot be built or trained, or a glob matches no parameter.
        ShardingError: A parameter has no place on the mesh.
    """
    plain = tree or ModelTree(config.model)
    check_globs(config, plain)
    tree, trainable = adapted_tree(config, plain)
    schedule = make_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule, trainable)
    abstract = abstract_state(tree, optimizer, trainable, mesh, config.frozen_dtype)
    step = make_train_step(
        tree,
        optimizer,
        schedule,
        abstract,
        accumulation=config.batch.accumulation,
        loss_chunk=config.loss_chunk,
        sources=sources,
    )
    return TrainProgram(config.model, mesh, tree, trainable, schedule, optimizer, abstract, step)


def check_globs(config: TrainConfig, tree: ModelTree) -> ModelTree:
    """Checks that every glob of the settings stands for parameters of the model.

    Args:
        config: The settings of the run.
        tree: The parameters of the plain model.

    Returns:
        The parameters of the run, with those of adapters and quantised kernels.

    Raises:
        ConfigError: A glob matches none, or has no effect.
    """
    found, trained = adapted_tree(config, tree)
    check_groups(config.optimizer, list(trained), [path for path in found.shapes if path not in set(trained)])
    return found


def choose_run_mesh(
    config: TrainConfig, tree: ModelTree, devices: Sequence[jax.Device] | None = None, slices: int = 0
) -> ChosenMesh:
    """Chooses the mesh of a run by its settings and the widths of its parameters.

    Args:
        config: The settings of the run.
        tree: The parameters of the run, with those of adapters and quantised kernels (`check_globs`).
        devices: The devices; by default all of them.
        slices: The number of slices where the settings leave it open; 0 takes that of the devices.

    Raises:
        ShardingError: The settings do not fit the devices.
    """
    sizes = config.mesh.to_dict()
    sizes["slices"] = sizes["slices"] or slices
    return choose_mesh(**sizes, devices=devices, uneven=partial(unsharded, tree.shapes))


def total_steps(config: TrainConfig, samples: int) -> int:
    """Returns the number of updates of a run whose epoch has the given number of samples.

    Raises:
        ConfigError: There would be none, or more than can be counted.
    """
    total = config.steps or math.ceil(config.epochs * samples / config.samples_per_step)
    if not 1 <= total <= MAX_INT:
        raise ConfigError(
            f"config.epochs = {config.epochs:g} of {samples} samples at config.samples_per_step = "
            f"{config.samples_per_step} are {total} updates: expected 1..{MAX_INT}"
        )
    return total


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Returns shapes, types and shardings of the global batch of one update, without arrays."""
    model = config.model
    shape = BatchShape(
        rows=config.batch.rows, tokens=config.batch.tokens, tiles=config.batch.tiles, tile_size=model.image.tile_size
    )
    return batch_structs(shape, batch_sharding(mesh), model.batch_fields)
