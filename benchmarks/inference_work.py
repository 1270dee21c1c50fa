"""What both sides of benchmarks/inference_speed.py share: models, their weights, one prompt with an AnyRes4 picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from training_work import weights

from vr_jax.data.anyres import layout
from vr_jax.data.types import Example
from vr_jax.model import paper
from vr_jax.model.config import LlavaConfig, ProjectorConfig, Qwen2Config, SiglipConfig, anyres4

__all__ = ["SYSTEMS", "Work", "weights", "work"]

TEXT_TOKENS = 60
# transformers has LLaVA-OneVision; the paper's systems at 1/9 and uncompressed are measured against each other.
SYSTEMS = ("onevision", "baseline", "vision_remember", "uncompressed", "tiny")


@dataclass(frozen=True)
class Work:
    """`batch` equal prompts of TEXT_TOKENS tokens and one picture, `new_tokens` after them, whatever they are."""

    config: LlavaConfig
    batch: int
    new_tokens: int

    @property
    def image_token(self) -> int:
        """Stands for the picture in transformers' prompt; in no text."""
        return self.config.text.vocab_size - 2

    @property
    def picture(self) -> tuple[int, int]:
        """Pixels; fills the largest grid: four tiles and the base."""
        return 2 * self.config.image.tile_size, 2 * self.config.image.tile_size

    @property
    def vision(self) -> np.ndarray:
        """The vision tokens' cells, newlines included."""
        return layout(self.picture, self.config.cells_per_side, self.config.image).cell

    def text(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.integers(0, self.config.text.vocab_size - 8, TEXT_TOKENS, np.int32)

    def pixels(self) -> np.ndarray:
        side = self.config.image.tile_size
        # Smooth, as pictures are: noise would hide errors in its average.
        coarse = np.random.default_rng(1).integers(0, 256, (5, side // 8, side // 8, 3), np.uint8)
        return np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)

    @property
    def before(self) -> int:
        """Text tokens in front of the picture."""
        return TEXT_TOKENS // 3

    def example(self) -> Example:
        text, vision = self.text(), self.vision
        cell = np.concatenate([np.full(self.before, -1), vision, np.full(TEXT_TOKENS - self.before, -1)])
        tokens = np.zeros(len(cell), np.int32)
        tokens[: self.before] = text[: self.before]
        tokens[self.before + len(vision) :] = text[self.before :]
        question = np.arange(len(cell)) >= self.before + len(vision)
        return Example(
            id="benchmark",
            tokens=tokens,
            loss_mask=np.zeros(len(cell), bool),
            guide_mask=question,
            vision_cell=cell.astype(np.int32),
            tile_pixels=self.pixels(),
            tile_image=np.ones(5, np.int32),
            cells_per_tile=self.config.cells_per_tile,
        )


def work(system: str, *, dtype: str, batch: int, new_tokens: int, text_layers: int = 0, vision_layers: int = 0) -> Work:
    """system: one of SYSTEMS. text_layers, vision_layers: fewer than the system has, for a quick look; 0 is all."""
    if system == "tiny":
        vision = SiglipConfig(
            hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=48, patch_size=8
        )
        text = Qwen2Config(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2
        )
    elif system == "onevision":  # SigLIP-so400m/14-384, all blocks, as llava-onevision-qwen2-0.5b-ov-hf has them
        vision = SiglipConfig(hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16, patch_size=14)
        text = paper.TEXTS["0.5b"]
    else:
        row = {
            "baseline": paper.BASELINE,
            "vision_remember": paper.VISION_REMEMBER,
            "uncompressed": paper.system("table4", "uncompressed"),
        }[system]
        return Work(dataclasses.replace(row.config(paper.TEXTS["0.5b"], "anyres4"), dtype=dtype), batch, new_tokens)  # type: ignore[arg-type]
    vision = dataclasses.replace(vision, num_layers=vision_layers or vision.num_layers)
    text = dataclasses.replace(text, num_layers=text_layers or text.num_layers)
    config = LlavaConfig(
        vision=vision,
        text=text,
        projector=ProjectorConfig(name="mlp", stride=1),
        vision_feature_layer=vision.num_layers,
        # transformers' OneVision always goes by anyres_max_9, which changes nothing for so few tiles.
        image=dataclasses.replace(anyres4(vision.image_size), aspect_ratio="anyres_max"),
        dtype=dtype,  # type: ignore[arg-type]
    )
    return Work(config, batch, new_tokens)
