"""Fits the rows of an update to the mesh, and says what that does to the samples and the learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vr_jax.errors import ConfigError
from vr_jax.settings import TrainConfig

_FACTORS = {"keep_lr": lambda more: 1.0, "linear_lr": lambda more: more, "sqrt_lr": math.sqrt}


@dataclass(frozen=True)
class BatchFit:
    """The batch of one update on a mesh.

    Attributes:
        config: The settings with the rows, samples and learning rates that are used.
        rule: A sentence for the log and the record of the run: which learning rates apply to how many samples, and why.
    """

    config: TrainConfig
    rule: str


def fit_batch(config: TrainConfig, replica: int, fsdp: int) -> BatchFit:
    """Fits the rows of an update to a mesh, as `config.batch.raise_rows` says.

    Args:
        config: The settings of the run.
        replica: Size of the mesh's axis.
        fsdp: Size of the mesh's axis.

    Raises:
        ConfigError: The mesh and the micro-batches do not divide the rows, and no rule for more rows is chosen. The
            message tells the samples of an update before and after.
    """
    batch = config.batch
    pieces = replica * fsdp * batch.accumulation
    if batch.rows % pieces == 0:
        rate = f"learning rate {config.optimizer.lr:g}"
        return BatchFit(config, f"{rate} as the config has it, for about {config.samples_per_step} samples per update")
    raised = raise_rows(config, pieces)
    if batch.raise_rows == "refuse":
        raise ConfigError(
            f"config.batch.rows = {batch.rows} is not divisible by {pieces} = replica {replica} x fsdp {fsdp} x "
            f"accumulation {batch.accumulation}: this mesh needs {raised.batch.rows} rows, about "
            f"{raised.samples_per_step} samples per update where config.samples_per_step = {config.samples_per_step}. "
            "Use fewer devices, a larger config.mesh.tensor or a smaller config.batch.accumulation; or accept that "
            "batch with config.batch.raise_rows=keep_lr, linear_lr or sqrt_lr, which says what becomes of the learning "
            "rate"
        )
    return BatchFit(
        raised,
        f"learning rate {config.optimizer.lr:g} for {config.samples_per_step} samples per update is "
        f"{raised.optimizer.lr:g} for {raised.samples_per_step} (config.batch.raise_rows = {batch.raise_rows!r}), "
        f"because {batch.rows} rows were raised to {raised.batch.rows} for {pieces} pieces of the batch",
    )


def raise_rows(config: TrainConfig, pieces: int) -> TrainConfig:
    """Returns the settings with the rows raised to the next multiple of `pieces`.

    `samples_per_step` grows with them, and the learning rates by the rule of `config.batch.raise_rows`.

    Args:
        config: The settings of the run.
        pieces: The pieces that the rows are divided into.
    """
    batch, optimizer = config.batch, config.optimizer
    rows = -(-batch.rows // pieces) * pieces
    samples = round(config.samples_per_step * rows / batch.rows)
    factor = _FACTORS.get(batch.raise_rows, _FACTORS["keep_lr"])(samples / config.samples_per_step)
    return config.replace(
        {
            "batch.rows": rows,
            "samples_per_step": samples,
            "optimizer.lr": optimizer.lr * factor,
            "optimizer.lr_groups": tuple((glob, lr * factor) for glob, lr in optimizer.lr_groups),
        }
    )
