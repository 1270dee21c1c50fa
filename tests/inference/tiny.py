"""A tiny model with the demo's tokenizer, and prompts of different lengths, images and turns."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny import random_model, tiny_config, tiny_decoder, tiny_encoder, tiny_refusion
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.texts import place_images
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.inference import Buckets
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import save_model

TOKENIZER = demo_tokenizer()
BUCKETS = Buckets(tokens=(48, 112), tiles=(4,))


def config(vision_remember: bool = True) -> VlmConfig:
    return tiny_config(
        encoder=tiny_encoder(num_layers=2),
        decoder=tiny_decoder(vocab_size=len(TOKENIZER) + 5, num_layers=3),  # more rows than tokens, as Qwen2 has
        refusion=tiny_refusion(insert_after=(1,), levels=(1, 2)) if vision_remember else None,
        image=ImageConfig(tile_size=24, aspect_ratio="anyres", grids=((2, 1), (1, 2))),
        vision_feature_layer=2,
    )


def model(config: VlmConfig, seed: int = 0) -> VisionLanguageModel:
    return random_model(config, seed)


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def conversations() -> dict[str, Conversation]:
    """Text only, one tile, several tiles, several images, several turns."""

    def user(text: str) -> Turn:
        return Turn("user", *place_images([text], text.count("<image>"))[0])

    return {
        "text": Conversation("text", (user("What is the word?"),)),
        "wide": Conversation("wide", (user("<image>\nHow many bars are there?"),), (png(48, 24, 1),)),
        "square": Conversation("square", (user("<image>\nWhich colour is the tallest bar? a b c"),), (png(40, 40, 2),)),
        "two": Conversation("two", (user("<image> <image>\nWhich?"),), (png(24, 24, 3), png(30, 20, 4))),
        "turns": Conversation(
            "turns",
            (user("<image>\nWhat is the word?"), Turn("assistant", "cat"), user("What colour is the word?")),
            (png(24, 48, 5),),
        ),
    }


def prompts(config: VlmConfig) -> dict[str, Example]:
    processor = Processor(TOKENIZER, config)
    return {name: processor.prompt(conversation) for name, conversation in conversations().items()}


def save(directory: Path, *, vision_remember: bool = True) -> Path:
    """A model directory with the tokenizer, as training exports it."""
    with tempfile.TemporaryDirectory() as folder:
        TOKENIZER.save_pretrained(folder)
        save_model(directory, model(config(vision_remember)), folder)
    return directory
