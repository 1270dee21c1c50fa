"""The lines with which a run begins: what is trained on what, in which types, and for how long."""

from __future__ import annotations

import logging

from vr_jax import distributed
from vr_jax.settings import TrainConfig
from vr_jax.sharding import batch_shards
from vr_jax.training.optimizer import Params
from vr_jax.training.program import TrainProgram
from vr_jax.training.state import parameter_count

logger = logging.getLogger("vr_jax.training")


def log_start(
    config: TrainConfig, program: TrainProgram, *, samples: int, start: int, total: int, mesh_rule: str, batch: str
) -> None:
    """Logs the devices, the parameters and their types, the batch, the learning rate and the steps.

    Args:
        config: The settings of the run.
        program: The computation of the run.
        samples: Samples of one epoch.
        start: Number of updates done before this start.
        total: Number of updates of the run.
        mesh_rule: A phrase that tells why the mesh is as it is.
        batch: A sentence that tells which learning rate applies to how many samples.
    """
    mesh, shape, optimizer = program.mesh, config.batch, config.optimizer
    processes = f" in {distributed.process_count()} processes" if distributed.process_count() > 1 else ""
    logger.info(
        "devices: %d x %s%s; mesh %s%s",
        mesh.size,
        mesh.devices.flat[0].device_kind,
        processes,
        " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        f", {mesh_rule}" if mesh.size > 1 else "",
    )
    logger.info(
        "parameters: %s trained, kept in float32; %s frozen, kept in %s; computed in %s, norms, softmax and loss in "
        "float32",
        _count(program.abstract.params),
        _count(program.abstract.frozen),
        config.frozen_dtype,
        config.model.dtype,
    )
    shards = batch_shards(mesh)
    pieces = [f"{shards} pieces of the mesh (replica x fsdp)"] if shards > 1 else []
    pieces += [f"{shape.accumulation} micro-batches"] if shape.accumulation > 1 else []
    logger.info(
        "an update: %d rows of %d tokens and %d tiles%s, about %d samples",
        shape.rows,
        shape.tokens,
        shape.tiles,
        f" in {' x '.join(pieces)}" if pieces else "",
        config.samples_per_step,
    )
    warmup = optimizer.warmup_steps(total)
    logger.info("%s; %s after %d steps of warm-up", batch, optimizer.schedule, warmup)
    logger.info(
        "steps %d..%d, %.2f epochs of %d samples; the first step takes longer, because it is compiled",
        start + 1,
        total,
        total * config.samples_per_step / samples,
        samples,
    )


def _count(params: Params) -> str:
    """The number of values in millions."""
    return f"{parameter_count(params) / 1e6:.2f} M"
