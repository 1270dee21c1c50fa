"""Plans the update that `vr-jax train` runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from vr_jax import sharding
from vr_jax.plan.compiling import bytes_per_chip, compile_for, memory_of, roofline_of, versions, work_of
from vr_jax.plan.results import Plan, Schedule
from vr_jax.plan.topology import Topology, compiling_for
from vr_jax.settings import TrainConfig
from vr_jax.training import (
    ModelTree,
    TrainProgram,
    abstract_batch,
    build_program,
    check_batch,
    check_globs,
    choose_run_mesh,
    moments,
    parameter_count,
    raise_rows,
    step_flops,
)

# The samples of the paper's two phases (docs/design/methods.md#data-files): LLaVA-Pretrain and LLaVA-NeXT-Data.
PHASE1_SAMPLES, PHASE2_SAMPLES = 558_128, 779_289
# The length of the schedule, which does not change the costs of a step.
STEPS = 1000


def plan_mesh(config: TrainConfig, topology: Topology) -> sharding.ChosenMesh:
    """Chooses the mesh as a run with these settings does.

    Raises:
        UserError: The settings do not fit the devices, or the model cannot be built.
    """
    tree = check_globs(config, ModelTree(config.model))
    return choose_run_mesh(config, tree, topology.devices, topology.slices)


def fit_rows(config: TrainConfig, shards: int, *, fixed: bool) -> tuple[TrainConfig, str | None]:
    """Raises the rows of an update to the next multiple that a mesh divides, and `samples_per_step` with them.

    Args:
        config: The settings of the run.
        shards: The pieces into which the mesh divides the rows of a batch.
        fixed: Whether the rows have to stay as they are.

    Returns:
        The settings, and a note about the change, or None if there is none.
    """
    pieces = shards * config.batch.accumulation
    if config.batch.rows % pieces == 0 or fixed:
        return config, None
    old_rows, old_samples, old_rate = config.batch.rows, config.samples_per_step, config.optimizer.lr
    more = -(-old_rows // pieces) * pieces / old_rows
    rates = f"{old_rate:g} kept, {old_rate * more:g} by the linear rule, {old_rate * math.sqrt(more):g} by the root"
    config = raise_rows(config, pieces)
    rows = config.batch.rows
    return config, (
        f"rows {old_rows} -> {rows}, samples per update {old_samples} -> {config.samples_per_step}: the config's rows "
        f"do not divide over {pieces} pieces of the batch; vr-jax train needs --config.batch.rows={rows} "
        f"--config.samples_per_step={config.samples_per_step}, and another learning rate may suit: {rates}"
    )


def plan_training(
    name: str,
    config: TrainConfig,
    topology: Topology,
    *,
    efficiency: float = 0.6,
    samples: int | None = None,
    fixed_rows: bool = False,
    effort: str | None = None,
) -> Plan:
    """Plans one update of a run.

    Args:
        name: The config's name in the plan.
        config: The settings of the run.
        topology: The devices to plan for.
        efficiency: The share of the bound's speed that a run reaches; the days of an epoch follow from it.
        samples: The samples of an epoch, or None for those of the paper's phase.
        fixed_rows: Whether the rows of an update have to stay as they are.
        effort: XLA's optimization level; see `compile_for`.

    Raises:
        UserError: The mesh or the batch does not fit the devices, or the compiler fails.
    """
    chosen = plan_mesh(config, topology)
    mesh = chosen.mesh
    config, changed = fit_rows(config, sharding.batch_shards(mesh), fixed=fixed_rows)
    check_batch(config.batch, mesh)
    program = build_program(config, mesh, STEPS)
    traced = trace_step(topology, config, program)
    compiled = compile_for(topology, mesh, traced, effort)
    state = program.abstract
    first_moments, second_moments = moments(state.opt_state)
    samples = samples or (PHASE1_SAMPLES if config.data.template == "plain" else PHASE2_SAMPLES)
    work = roofline = None
    if compiled.costs is not None:
        work = work_of(topology, mesh, traced, compiled.costs, model_flops(config, program.trainable))
        roofline = roofline_of(topology, work)
    steps = math.ceil(samples * config.epochs / config.samples_per_step)
    return Plan(
        config=name,
        mode="train",
        topology=topology.name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        settings={
            **config.batch.to_dict(),
            "remat": config.model.remat,
            "attention": config.model.attention,
            "optimization_level": effort or "default",
        },
        notes=[*_mesh_note(chosen), *([changed] if changed else []), *_kept_whole(program)],
        parameters=parameter_count(state.params | state.frozen),
        trained_parameters=parameter_count(state.params),
        tokens=config.batch.rows * config.batch.tokens,
        samples=config.samples_per_step,
        memory=memory_of(
            compiled,
            trained=bytes_per_chip(state.params),
            frozen=bytes_per_chip(state.frozen),
            gradients=bytes_per_chip(state.params),
            optimizer=bytes_per_chip(state.opt_state),
            first_moments=bytes_per_chip(first_moments),
            second_moments=bytes_per_chip(second_moments),
            inputs=bytes_per_chip((abstract_batch(config, mesh), state.step)),
        ),
        work=work,
        roofline=roofline,
        schedule=Schedule(
            samples=samples,
            steps=steps,
            efficiency=efficiency,
            days=steps * roofline.bound / efficiency / 86400 if roofline is not None else None,
        ),
        compile_seconds=compiled.seconds,
        versions=versions(topology),
    )


def trace_step(topology: Topology, config: TrainConfig, program: TrainProgram) -> jax.stages.Traced:
    """Traces the jitted update of `vr-jax train` for a topology."""
    step: Callable[..., Any] = program.step
    with compiling_for(topology, program.mesh):
        return step.trace(program.abstract, abstract_batch(config, program.mesh))  # type: ignore[attr-defined]  # the step is jitted, and its type is that of a function


def model_flops(config: TrainConfig, trainable: tuple[str, ...]) -> float:
    """Returns the operations that the model needs for one update with full rows.

    Every slot is used, the samples have equal lengths, and every position that holds no vision token has a target.
    """
    batch, model = config.batch, config.model
    tokens = batch.rows * batch.tokens
    length = tokens / config.samples_per_step
    return step_flops(model, trainable).total(
        tiles=batch.rows * batch.tiles,
        tokens=tokens,
        pairs=tokens * (length + 1) / 2,
        targets=max(0, tokens - batch.rows * batch.tiles * model.cells_per_tile),
    )


def _mesh_note(chosen: sharding.ChosenMesh) -> list[str]:
    """Returns why the mesh is as it is, where the settings do not say it and it is not simply all devices."""
    divided = chosen.rule != sharding.AS_SET and chosen.mesh.shape["replica"] > 1
    return [f"mesh {chosen.rule}"] if divided or chosen.slices > 1 else []


def _kept_whole(program: TrainProgram) -> list[str]:
    """Returns a note about parameter axes that the mesh does not divide, if there are any."""
    lines = sharding.unsharded(program.tree.shapes, program.mesh)
    if not lines:
        return []
    axes = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    return [f"{len(lines)} parameter axes do not divide over the mesh ({axes}) and are kept whole: {lines[0]}, ..."]
