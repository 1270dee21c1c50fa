"""A config file of tiny models: a baseline, Vision Remember, one without compression, and one with a pruner."""

from __future__ import annotations

from pathlib import Path

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from tests.tiny import tiny_config, tiny_decoder, tiny_encoder, tiny_refusion
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.config import single_tile
from vr_jax.settings import TrainConfig

COMMON = dict(encoder=tiny_encoder(num_layers=2), decoder=tiny_decoder(vocab_size=320, num_layers=2),
              image=single_tile(24), vision_feature_layer=2)
REMEMBER = tiny_refusion(insert_after=(1,), levels=(1, 2))
UNCOMPRESSED = MlpConfig()
MODELS = {
    "baseline": tiny_config(**COMMON, refusion=None),
    "remember": tiny_config(**COMMON, refusion=REMEMBER),
    "uncompressed": tiny_config(**COMMON, refusion=None, projector=UNCOMPRESSED),
    "fastv": tiny_config(**COMMON, refusion=None, projector=UNCOMPRESSED),
}


def get_config(variant="baseline"):
    if variant == "no_model":
        return ConfigDict({"steps": 1})
    if variant not in MODELS:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(MODELS)}")
    config = TrainConfig(model=MODELS[variant])
    if variant == "fastv":
        config = config.replace({"eval.pruning": '{"name": "fastv", "layer": 1, "keep": 0.25}'})
    return config.to_config_dict()
"""


def write(folder: Path) -> Path:
    """Writes the config file and returns its path."""
    path = folder / "tiny.py"
    path.write_text(CONFIG)
    return path
