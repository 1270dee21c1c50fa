"""A model of 32-pixel tiles with 2 x 2 cells each, the demo's tokenizer, and images drawn on the spot."""

import io

import numpy as np
import pytest
from PIL import Image

from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.types import Conversation, Turn
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.qwen2 import Qwen2Config
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))


def tiny_config(*, image: ImageConfig | None = None, text_pool: str | None = "first_turn") -> VlmConfig:
    refusion = VisionRememberConfig(insert_after=(1,), levels=(1,), text_pool=text_pool) if text_pool else None
    return VlmConfig(
        encoder=SiglipConfig(
            hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, image_size=32, patch_size=8
        ),
        decoder=Qwen2Config(
            vocab_size=512, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, num_kv_heads=1
        ),
        projector=PoolConfig(stride=2),
        refusion=refusion,
        image=image or ImageConfig(tile_size=32, aspect_ratio="anyres", grids=GRIDS),
        vision_feature_layer=1,
    )


def png(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(stream, "PNG")
    return stream.getvalue()


def chat(*texts: str, images: tuple = (), name: str = "sample") -> Conversation:
    """User and assistant take turns, the user first."""
    roles = ("user", "assistant")
    return Conversation(name, tuple(Turn(roles[k % 2], text) for k, text in enumerate(texts)), images)


@pytest.fixture(scope="session")
def tokenizer():
    return demo_tokenizer()
