"""A model small enough for two CPU cores, trained from scratch on real images with the real Qwen2 tokenizer.

Used by benchmarks/accuracy/real_charts.py. Nothing here is pretrained, so phase 1 (captions) trains the encoder and the decoder
too; phase 2 (chart questions) freezes the encoder, as the paper does. It memorises; it does not generalise."""

from ml_collections import ConfigDict

from vr_jax.model.config import VlmConfig, anyres4, single_tile
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.settings import recipe

TILE = 96  # pixels
VISION = SiglipConfig(hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4, image_size=TILE, patch_size=8)
TEXT = Qwen2Config(hidden_size=96, intermediate_size=256, num_layers=4, num_heads=4, num_kv_heads=2)


def get_config(variant: str = "phase1") -> ConfigDict:
    if variant not in ("phase1", "phase2"):
        raise ValueError(f"no recipe {variant!r}: expected phase1 or phase2")
    model = VlmConfig(
        encoder=VISION,
        decoder=TEXT,
        projector=PoolConfig(stride=3),
        refusion=VisionRememberConfig(insert_after=(1, 3), levels=(2, 3, 4)),
        vision_feature_layer=4,
        image=single_tile(TILE) if variant == "phase1" else anyres4(TILE),
    )
    config = recipe.base(model)
    config.data.workers = 0
    config.data.label_quirk = False
    config.frozen_dtype = "float32"
    config.loss_chunk = 256
    config.optimizer.lr = 2e-3
    config.checkpoint = ConfigDict({"every": 100, "keep_last": 1, "keep_best": 1})
    if variant == "phase1":
        config.data.template = "plain"
        config.batch = ConfigDict({"rows": 4, "tokens": 256, "tiles": 6, "accumulation": 1})
        config.samples_per_step = 22
        config.steps = 60
    else:
        config.batch = ConfigDict({"rows": 11, "tokens": 512, "tiles": 15, "accumulation": 1})
        config.samples_per_step = 32
        config.steps = 240
        config.trainable = ("decoder.*", "refusion.*", "projector.*", "image_newline")
    return config
