"""The demo: a tiny LLaVA-VR learns to read generated charts, tables and words in minutes on two CPU cores.

Variant `uncompressed`: every patch is a vision token, no Vision Remember; what the pruners work on."""

import dataclasses

from ml_collections import ConfigDict

from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.settings import recipe

MODEL = VlmConfig(
    encoder=SiglipConfig(hidden_size=72, intermediate_size=216, num_layers=3, num_heads=3, image_size=48, patch_size=8),
    decoder=Qwen2Config(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=288,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=1e4,
        initializer_range=0.1,
    ),
    projector=PoolConfig(stride=2),
    refusion=VisionRememberConfig(insert_after=(1, 2), levels=(1, 2, 3)),
    image=single_tile(48),
    vision_feature_layer=3,
)

UNCOMPRESSED = dataclasses.replace(MODEL, projector=MlpConfig(), refusion=None)


def get_config(variant: str = "") -> ConfigDict:
    models = {"": MODEL, "uncompressed": UNCOMPRESSED}
    if variant not in models:
        raise ValueError(f"no variant {variant!r}: expected none, or 'uncompressed'")
    config = recipe.base(models[variant])
    config.tokenizer = "demo"
    config.data.format = "demo"
    config.data.demo.update({"size": 50_000, "seed": 0, "turns": 4})
    config.data.label_quirk = False  # targets are the answers only
    config.data.workers = 0
    # About 70 tokens a sample, so a row packs three or four.
    config.batch = ConfigDict({"rows": 20, "tokens": 256, "tiles": 4, "accumulation": 1})
    config.samples_per_step = 66
    config.steps = 700
    config.trainable = ("*",)  # from scratch, so the encoder too
    config.frozen_dtype = "float32"
    config.optimizer.lr = 2e-3
    config.optimizer.b2 = 0.98
    config.optimizer.warmup_ratio = 0.05
    config.loss_chunk = 512
    config.checkpoint = ConfigDict({"every": 500, "keep_last": 2, "keep_best": 1})
    return config
