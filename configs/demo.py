"""The demo: a tiny LLaVA-VR learns to read generated charts, tables and words in minutes on two CPU cores."""

from ml_collections import ConfigDict

from vr_jax.model.config import (
    LlavaConfig,
    ProjectorConfig,
    Qwen2Config,
    SiglipConfig,
    VisionRememberConfig,
    single_tile,
)
from vr_jax.training import recipe

MODEL = LlavaConfig(
    vision=SiglipConfig(hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, image_size=48, patch_size=8),
    text=Qwen2Config(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, num_kv_heads=2),
    projector=ProjectorConfig(stride=2),
    interlude=VisionRememberConfig(insert_after=(1, 2), levels=(1, 2, 3)),
    image=single_tile(48),
    vision_feature_layer=3,
)


def get_config() -> ConfigDict:
    config = recipe.base(MODEL)
    config.tokenizer = "demo"
    config.data.format = "demo"
    config.data.options = ConfigDict({"size": 20_000, "seed": 0, "turns": 1})
    config.data.workers = 0
    config.batch = ConfigDict({"rows": 32, "tokens": 64, "tiles": 2, "accumulation": 1})
    config.samples_per_step = 32
    config.steps = 500
    config.trainable = ("*",)  # from scratch, so the encoder too
    config.frozen_dtype = "float32"
    config.optimizer.lr = 1e-3
    config.loss_chunk = 64
    config.checkpoint = ConfigDict({"every": 250, "keep_last": 2, "keep_best": 1})
    return config
