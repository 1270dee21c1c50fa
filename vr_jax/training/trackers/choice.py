"""Which trackers a run has."""

from __future__ import annotations

from pathlib import Path

from vr_jax.settings import TrainConfig
from vr_jax.training.trackers.group import Trackers
from vr_jax.training.trackers.protocol import Tracker


def open_trackers(config: TrainConfig, workdir: Path, *, resume_step: int, active: bool = True) -> Trackers:
    """Opens the trackers that the settings name.

    Args:
        config: The settings of the run.
        workdir: Folder of the run.
        resume_step: The last step of the checkpoint that the run continues from; 0 for a new run.
        active: Whether this process writes. Of several processes only the first one does.

    Raises:
        UserError: `metrics.jsonl` cannot be read or written.
    """
    others = _others(config) if active else []
    return Trackers(workdir, resume_step=resume_step, others=others, config=config.to_dict(), active=active)


def _others(config: TrainConfig) -> list[Tracker]:
    """The trackers besides `metrics.jsonl`. Their libraries are imported here only, because that takes seconds."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        from vr_jax.training.trackers.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    return trackers
