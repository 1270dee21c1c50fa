"""The settings of the trackers besides `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from vr_jax.fields import Config, Distinct, Text

TrackerName = Literal["wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class WandbSettings(Config):
    """How a run stands in Weights & Biases. What is None is left to its own settings, e.g. WANDB_ENTITY.

    Attributes:
        project: The project.
        entity: The user or team.
        name: The name of the run. None is that of the workdir's folder.
        group: The group of runs that the run belongs to.
        tags: Its tags.
        mode: "online", or "offline", which writes to `<workdir>/wandb` for a later `wandb sync`. None is what
            WANDB_MODE says, or "online".
    """

    project: Text = "vr_jax"
    entity: Text | None = None
    name: Text | None = None
    group: Text | None = None
    tags: Annotated[tuple[Text, ...], Distinct()] = ()
    mode: Literal["online", "offline"] | None = None


@dataclass(frozen=True, kw_only=True)
class TrackioSettings(Config):
    """How a run stands in trackio. What is None is left to its own settings.

    Attributes:
        project: The project.
        name: The name of the run. None is that of the workdir's folder and the identity of the run.
        group: The group of runs that the run belongs to.
        space: The Hugging Face space that shows the run, e.g. "user/space". None keeps it on this machine, in the
            folder that TRACKIO_DIR names.
    """

    project: Text = "vr_jax"
    name: Text | None = None
    group: Text | None = None
    space: Text | None = None
