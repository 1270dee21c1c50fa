"""A model with LLaVA-OneVision's shapes for both sides of `benchmarks.speed.generation`.

The module holds its config, its weights, and a prompt with one image of five tiles.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.speed.training_work import weights
from vr_jax import experiments
from vr_jax.data.anyres import layout
from vr_jax.data.collate import collate
from vr_jax.data.types import Example
from vr_jax.model.batch import NO_CELL, Batch, BatchShape
from vr_jax.model.config import VlmConfig, anyres4, anyres9_all36
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig

SO400M = SiglipConfig(
    hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16, image_size=384, patch_size=14
)
TEXT_TOKENS = (14, 46)  # Text tokens before and after the image, as the chat template has them.
SIZES = ("0.5b", "quick", "tiny")


def onevision(size: str, dtype: str) -> VlmConfig:
    """The config of a size: "0.5b" (SO400M and Qwen2-0.5B), "quick" (the same with 3 layers each) or "tiny"."""
    vision, text = SO400M, experiments.DECODERS["0.5b"]
    if size == "quick":
        vision, text = dataclasses.replace(vision, num_layers=3), dataclasses.replace(text, num_layers=3)
    elif size == "tiny":
        vision = SiglipConfig(
            hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, image_size=27, patch_size=4
        )
        text = TransformerConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2
        )
    return VlmConfig(
        encoder=vision,
        decoder=text,
        projector=MlpConfig(),
        vision_feature_layer=vision.num_layers,
        image=anyres9_all36(vision.image_size),
        dtype=dtype,  # type: ignore[arg-type]  # VlmConfig checks the name.
    )


def systems(tiny: bool) -> dict[str, VlmConfig]:
    """Three systems of the paper by name: no compression, 1/9, and 1/9 with Vision Remember.

    They have AnyRes4, Qwen2-0.5B and bfloat16. Source: paper, Figure 4 and Table 5d.
    """
    configs = {
        "uncompressed": experiments.find_row("table4", "uncompressed"),
        "baseline 1/9": experiments.BASELINE,
        "Vision Remember 1/9": experiments.VISION_REMEMBER,
    }
    if not tiny:
        return {
            name: dataclasses.replace(system.config(experiments.DECODERS["0.5b"], "anyres4"), dtype="bfloat16")
            for name, system in configs.items()
        }
    vision = SiglipConfig(hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, image_size=24, patch_size=4)
    text = TransformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4, num_kv_heads=2
    )
    size = VlmConfig(encoder=vision, decoder=text, vision_feature_layer=3, image=anyres4(24))
    changes = {"vision_remember": {"cross_heads": 4}}
    return {name: system.at(size, {7: 1, 15: 2, 23: 3}, changes) for name, system in configs.items()}


@dataclass(frozen=True)
class Prompt:
    """Equal rows of text with one image that fills a grid of 2 x 2 tiles.

    Attributes:
        config: The model.
        batch_size: The number of rows.
    """

    config: VlmConfig
    batch_size: int

    @property
    def cells(self) -> np.ndarray:
        """`Batch.vision_cell` of the image's tokens: the base tile, then the rows of the grid with their newlines."""
        side = self.config.image.tile_size
        return layout((2 * side, 2 * side), self.config.cells_per_side, self.config.image).cell

    @property
    def text(self) -> tuple[np.ndarray, np.ndarray]:
        """The text tokens before and after the image."""
        tokens = np.random.default_rng(0).integers(0, min(self.config.decoder.vocab_size, 150000) - 8, sum(TEXT_TOKENS))
        return tokens[: TEXT_TOKENS[0]], tokens[TEXT_TOKENS[0] :]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return len(self.cells) + sum(TEXT_TOKENS)

    @property
    def pixels(self) -> np.ndarray:
        """The tiles as uint8; the base tile comes first."""
        side = self.config.image.tile_size
        return np.random.default_rng(1).integers(0, 256, (5, side, side, 3), np.uint8)

    def batch(self) -> Batch:
        """The rows for vr_jax, as host arrays."""
        before, after = self.text
        vision = slice(len(before), len(before) + len(self.cells))
        tokens, cell = np.zeros(self.length, np.int32), np.full(self.length, NO_CELL, np.int32)
        tokens[: vision.start], tokens[vision.stop :], cell[vision] = before, after, self.cells
        example = Example(
            id="prompt",
            tokens=tokens,
            loss_mask=np.zeros(self.length, bool),
            text_token_mask=np.arange(self.length) >= vision.stop,
            vision_cell=cell,
            tile_pixels=self.pixels,
            tile_image=np.ones(len(self.pixels), np.int32),
            cells_per_tile=self.config.cells_per_tile,
        )
        shape = BatchShape(
            rows=self.batch_size,
            tokens=self.length,
            tiles=len(self.pixels),
            tile_size=self.config.image.tile_size,
        )
        rows = [[example]] * self.batch_size
        return collate(rows, shape, optional=self.config.batch_fields).batch

    def torch_inputs(self, image_token: int, torch: Any) -> dict[str, Any]:
        """The rows for transformers, as host tensors. Pixels are float32 from -1 to 1, as its processor makes them."""
        before, after = self.text
        ids = np.concatenate([before, np.full(len(self.cells), image_token), after])
        pixels = self.pixels.astype(np.float32) * (2 / 255) - 1
        side = self.config.image.tile_size
        return {
            "input_ids": torch.from_numpy(np.repeat(ids[None], self.batch_size, 0)),
            "pixel_values": torch.from_numpy(
                np.repeat(pixels.transpose(0, 3, 1, 2)[None], self.batch_size, 0).astype(np.float32)
            ),
            "image_sizes": torch.tensor([[2 * side, 2 * side]] * self.batch_size),
        }


def our_model(config: VlmConfig, wrong: bool = False) -> Any:
    """The model of vr_jax with the shared weights.

    Args:
        config: The model.
        wrong: Whether the decoder's value kernels are doubled, for the test that this is noticed.
    """
    import jax.numpy as jnp

    from vr_jax.model.parameters import split_stages, unflatten_params
    from vr_jax.model.vlm import abstract_model

    values = weights(config)
    if wrong:
        values[next(path for path in values if path.startswith("decoder.") and path.endswith("attn.v.kernel"))] *= 2
    abstract = abstract_model(config)
    staged = split_stages({path: values.pop(path).astype(config.dtype) for path in list(values)}, config)
    return unflatten_params(abstract, {path: jnp.asarray(value) for path, value in staged.items()})


def torch_model(config: VlmConfig, torch: Any, device: str) -> tuple[Any, int]:
    """The model of transformers with the same weights, and the id of its image token."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from vr_jax.convert.architectures import HF_LLAVA
    from vr_jax.convert.config_writing import write_hf_llava
    from vr_jax.convert.tables import slots

    image_token = config.decoder.vocab_size - 4
    values = write_hf_llava(config, image_token)
    values["vision_config"]["vision_use_head"] = False
    values.pop("architectures")
    with torch.device(device):  # Its own initialisation is fast there; every value is overwritten.
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**values))
    params = weights(config)
    places = slots(HF_LLAVA.table(HF_LLAVA.tables, config.to_dict()), params)
    found = set()
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # It lists tied parameters once.
            for pattern, replacement in HF_LLAVA.renames:
                name = re.sub(pattern, replacement, name)
            tensor.copy_(torch.from_numpy(places[name].take(params)))
            found.add(name)
    if missing := set(places) - found:
        raise RuntimeError(f"transformers' model has no {sorted(missing)[:4]}")
    return model.to(dtype=getattr(torch, config.dtype)).eval(), image_token
