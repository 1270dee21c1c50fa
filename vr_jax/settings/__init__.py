"""The settings of a run: `TrainConfig`, and `load_config`, which reads it from a config file."""

from vr_jax.settings.command_settings import EvaluationSettings, ProbeSettings
from vr_jax.settings.config_files import load_config, read_config_file, split_variant
from vr_jax.settings.data_settings import DEMO, DataSettings, DemoDataSettings, SourceSettings
from vr_jax.settings.lora_settings import LoraSettings
from vr_jax.settings.run_settings import (
    BatchSettings,
    CheckpointSettings,
    MeshSettings,
    OptimizerSettings,
    ProfileSettings,
)
from vr_jax.settings.tracker_settings import TrackioSettings, WandbSettings
from vr_jax.settings.train_config import TRAINING, TrainConfig
from vr_jax.settings.validation_settings import LOSS, HeldOutSettings, ValidationSettings

__all__ = [
    "DEMO",
    "LOSS",
    "TRAINING",
    "BatchSettings",
    "CheckpointSettings",
    "DataSettings",
    "DemoDataSettings",
    "EvaluationSettings",
    "HeldOutSettings",
    "LoraSettings",
    "MeshSettings",
    "OptimizerSettings",
    "ProbeSettings",
    "ProfileSettings",
    "SourceSettings",
    "TrackioSettings",
    "TrainConfig",
    "ValidationSettings",
    "WandbSettings",
    "load_config",
    "read_config_file",
    "split_variant",
]
