"""Plans the update that train.py runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from vr_jax import sharding
from vr_jax.plan.compiling import bytes_per_chip, compile_for, memory_of, roofline_of, versions, work_of
from vr_jax.plan.results import Plan, Schedule
from vr_jax.plan.topology import Topology, compiling_for
from vr_jax.settings import TrainConfig
from vr_jax.training import TrainProgram, abstract_batch, build_program, check_batch, step_flops

# Samples of the paper's two phases (docs/design/methods.md#data-files): LLaVA-Pretrain's 558K, LLaVA-NeXT-Data's 779K.
PHASE1_SAMPLES, PHASE2_SAMPLES = 558_128, 779_289
STEPS = 1000  # the schedule's length does not change what a step needs


def fit_rows(config: TrainConfig, shards: int, *, fixed: bool) -> tuple[TrainConfig, str | None]:
    """The settings with the rows of an update raised to the next multiple that this mesh divides, and
    `samples_per_step` with them, and a note that says so. fixed: the user chose the rows."""
    pieces = shards * config.batch.accumulation
    rows = -(-config.batch.rows // pieces) * pieces
    if rows == config.batch.rows or fixed:
        return config, None
    old_rows, old_samples = config.batch.rows, config.samples_per_step
    config = config.replace({"batch.rows": rows, "samples_per_step": round(old_samples * rows / old_rows)})
    return config, (
        f"rows {old_rows} -> {rows}, samples per update {old_samples} -> {config.samples_per_step}: the config's rows "
        f"do not divide over {pieces} pieces of the batch; train.py needs --config.batch.rows={rows} "
        f"--config.samples_per_step={config.samples_per_step}, and another learning rate may suit"
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
    """What one update of a run needs on each chip of a topology.

    samples: of an epoch; default: those of the paper's phase. effort: see `compile_for`.
    Raises UserError, ConfigError or ShardingError."""
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=topology.devices)
    config, changed = fit_rows(config, sharding.batch_shards(mesh), fixed=fixed_rows)
    check_batch(config.batch, mesh)
    program = build_program(config, mesh, STEPS)
    traced = trace_step(topology, config, program)
    compiled = compile_for(topology, mesh, traced, effort)
    state = program.abstract
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
        notes=[*([changed] if changed else []), *_kept_whole(program)],
        parameters=_count(state.params) + _count(state.frozen),
        trained_parameters=_count(state.params),
        tokens=config.batch.rows * config.batch.tokens,
        samples=config.samples_per_step,
        memory=memory_of(
            compiled,
            trained=bytes_per_chip(state.params),
            frozen=bytes_per_chip(state.frozen),
            optimizer=bytes_per_chip(state.opt_state),
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
    """The jitted update that train.py calls, traced for this topology."""
    step: Callable = program.step
    with compiling_for(topology, program.mesh):
        return step.trace(program.abstract, abstract_batch(config, program.mesh))  # type: ignore[attr-defined]


def model_flops(config: TrainConfig, trainable: tuple[str, ...]) -> float:
    """Operations that the model needs for one update whose rows are full: every slot used, samples of equal lengths, a
    target at every position that is no vision token."""
    batch, model = config.batch, config.model
    tokens = batch.rows * batch.tokens
    length = tokens / config.samples_per_step
    return step_flops(model, trainable).total(
        tiles=batch.rows * batch.tiles,
        tokens=tokens,
        pairs=tokens * (length + 1) / 2,
        targets=max(0, tokens - batch.rows * batch.tiles * model.cells_per_tile),
    )


def _kept_whole(program: TrainProgram) -> list[str]:
    lines = sharding.unsharded(program.tree.shapes, program.mesh)
    if not lines:
        return []
    axes = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    return [f"{len(lines)} parameter axes do not divide over the mesh ({axes}) and are kept whole: {lines[0]}, ..."]


def _count(params: dict[str, jax.Array]) -> int:
    return sum(math.prod(leaf.shape) for leaf in params.values())
