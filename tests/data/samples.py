"""Samples for the tests of the data package: images of noise, short chats, raw records and a small model config."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import tiny_config, tiny_decoder, tiny_encoder, tiny_refusion
from vr_jax.data.texts import place_images
from vr_jax.data.types import IMAGE, Conversation, Part, Skip, Turn
from vr_jax.model.config import ImageConfig, VlmConfig

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))

# The messages of a raw record. Characters of two and four bytes make byte and character positions differ.
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Größe 😀"}]


def small_config(*, image: ImageConfig | None = None, text_pool: str | None = "first_turn") -> VlmConfig:
    """A model of 32-pixel tiles with 2 x 2 cells each; without Vision Remember if `text_pool` is None."""
    return tiny_config(
        encoder=tiny_encoder(image_size=32, patch_size=8, num_layers=2),
        decoder=tiny_decoder(vocab_size=512, num_layers=2),
        refusion=tiny_refusion(insert_after=(1,), levels=(1,), text_pool=text_pool) if text_pool else None,
        image=image or ImageConfig(tile_size=32, aspect_ratio="anyres", grids=GRIDS),
        vision_feature_layer=1,
    )


def interpolating_image_config() -> ImageConfig:
    """An image config under which larger images are shrunk bilinearly."""
    grids = tuple((w, h) for w in range(1, 4) for h in range(1, 4))
    return ImageConfig(tile_size=32, aspect_ratio="anyres_max", grids=grids, max_tiles=2)


def png(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> bytes:
    """An encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(stream, "PNG")
    return stream.getvalue()


def chat(*texts: str, images: tuple[Path | bytes, ...] = (), name: str = "sample") -> Conversation:
    """A conversation in which user and assistant take turns, the user first; its `<image>` are images."""
    roles = ("user", "assistant")
    turns = [Turn(roles[k % 2], *(parts(text) if k % 2 == 0 else (text,))) for k, text in enumerate(texts)]
    return Conversation(name, tuple(turns), images)


def parts(text: str) -> tuple[Part, ...]:
    """The parts of a text in which every `<image>` is an image."""
    return place_images([text], text.count("<image>"))[0]


def record(k: int, **changes: Any) -> dict[str, Any]:
    """Raw record k, about one of the images 0.png, 1.png and 2.png."""
    return {"id": f"r{k}", "image": f"{k % 3}.png", "conversations": TALK} | changes


def conversation(k: int, image: Path | bytes) -> Conversation:
    """The conversation that `record(k)` stands for."""
    return Conversation(f"r{k}", (Turn("user", IMAGE, "\nWhat?"), Turn("assistant", "Größe 😀")), (image,))


def as_list(source: Any) -> list[Conversation | Skip]:
    """All records of a source."""
    return [source[k] for k in range(len(source))]
