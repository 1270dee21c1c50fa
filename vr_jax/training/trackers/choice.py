"""Which trackers a run has."""

from __future__ import annotations

import importlib.util

from vr_jax.errors import UserError
from vr_jax.failures import DISTRIBUTION
from vr_jax.settings import TrainConfig
from vr_jax.storage import Path
from vr_jax.training.trackers.group import Trackers
from vr_jax.training.trackers.protocol import Tracker


def check_trackers(config: TrainConfig) -> None:
    """Makes sure, before a run begins, that the libraries of its trackers are installed.

    Raises:
        UserError: One is not; the message names the extra that installs it.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"config.trackers names {name!r}, whose library is not installed; leave it out, or install it: "
                f"pip install '{DISTRIBUTION}[{name}]'"
            )


def open_trackers(
    config: TrainConfig, workdir: Path, *, resume_step: int, identity: str = "", active: bool = True
) -> Trackers:
    """Opens the trackers that the settings name.

    Args:
        config: The settings of the run.
        workdir: Folder of the run.
        resume_step: The last step of the checkpoint that the run continues from; 0 for a new run.
        identity: What tells the run apart from all others, the same at each of its starts.
        active: Whether this process writes. Of several processes only the first one does.

    Raises:
        UserError: `metrics.jsonl` cannot be read or written.
    """
    others = _others(config) if active else []
    return Trackers(
        workdir, resume_step=resume_step, others=others, config=config.to_dict(), identity=identity, active=active
    )


def _others(config: TrainConfig) -> list[Tracker]:
    """The trackers besides `metrics.jsonl`. Their libraries are imported here only, because that takes seconds."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        from vr_jax.training.trackers.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    if "wandb" in config.trackers:
        from vr_jax.training.trackers.wandb import WandbTracker

        trackers.append(WandbTracker(config.wandb))
    if "trackio" in config.trackers:
        from vr_jax.training.trackers.trackio import TrackioTracker

        trackers.append(TrackioTracker(config.trackio))
    return trackers
