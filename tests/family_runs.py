"""Tiny runs of each family of models: training on the demo's images in its chat format, and a model directory.

The families are those of tests/model/families.py; "llava" is here what the hub has, a CLIP encoder with a Llama.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.model.families import FAMILIES, family_config
from tests.tiny import random_model, tiny_config, tiny_decoder, tiny_refusion
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.encoders.clip import ClipConfig
from vr_jax.model_directory import save_model
from vr_jax.settings import DEMO, TrainConfig

__all__ = ["FAMILIES", "run_config", "save_family", "small_config", "tokenizer"]

TEMPLATES = {"llava": "vicuna_v1", "qwen2_5_vl": "qwen2_vl", "minicpm_v": "minicpm_v"}
SPECIALS = ("<s>", "</s>", "<|vision_start|>", "<|vision_end|>", "<image>", "</image>", "<slice>", "</slice>")
# Fixed parts of the formats as whole tokens, which keeps conversations short.
PHRASES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER:",
    "ASSISTANT:",
    "<用户>",
    "<AI>",
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer with the tokens of all families' chat formats; texts begin with <s> where a format wants."""
    made = demo_tokenizer()
    made.add_tokens([AddedToken(name, normalized=False) for name in PHRASES])
    made.add_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS], special_tokens=True)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))]
    )
    made.bos_token = "<s>"
    return made


def small_config(name: str, **changes: Any) -> VlmConfig:
    """A model of a family with Vision Remember, which cuts the demo's images into several tiles.

    Args:
        name: One of `FAMILIES`.
        **changes: Fields of the config with other values.
    """
    refusion = tiny_refusion(insert_after=(1,), levels=(1, 2), cross_heads=2, init="torch_default")
    decoder = tiny_decoder(vocab_size=len(tokenizer()) + 3, num_layers=2, hidden_size=32)
    base = {"refusion": refusion, "template": TEMPLATES[name]}
    if name == "llava":
        llama = dataclasses.replace(decoder, attention_bias=False, tie_word_embeddings=False)
        encoder = ClipConfig(
            hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, image_size=24, patch_size=4
        )
        image = ImageConfig(tile_size=24, aspect_ratio="anyres", grids=((1, 1), (2, 1), (1, 2), (2, 2)))
        base |= {"encoder": encoder, "decoder": llama, "image": image, "vision_feature_layer": 2}
        return tiny_config(**base | changes)
    family = family_config(name)
    if name == "qwen2_5_vl":
        encoder = dataclasses.replace(family.encoder, num_layers=2, full_attention_layers=(1,))
        image = dataclasses.replace(family.image, min_pixels=16**2, max_pixels=40**2)
        base |= {"decoder": dataclasses.replace(decoder, rope_sections=(1, 2, 1)), "vision_feature_layer": 2}
    else:
        encoder = dataclasses.replace(family.encoder, num_layers=2)
        image = dataclasses.replace(family.image, slice_size=20, max_slices=4)
        scales = {"embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 0.5, "attention_bias": False}
        base |= {"decoder": dataclasses.replace(decoder, **scales), "vision_feature_layer": 3}
    return family_config(name, **base | {"encoder": encoder, "image": image} | changes)


def save_family(directory: Path, config: VlmConfig, seed: int = 0) -> Path:
    """Writes a model directory with small random parameters of a seed and the tokenizer of `tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        save_model(directory, random_model(config, seed, scale=0.05), folder)
    return directory


def run_config(name: str, **changes: Any) -> TrainConfig:
    """A run that trains all but the encoder on the demo's images, in packed rows.

    Args:
        name: One of `FAMILIES`.
        **changes: Values by dotted field name; `init_from` is a directory of `save_family`.
    """
    fields = {
        "data.format": DEMO,
        "data.demo.size": 3,  # one of each subject
        "data.demo.turns": 1,  # MiniCPM-V closes the last reply of a conversation only
        "data.workers": 0,
        "batch.rows": 8,
        "batch.tokens": 192,
        "batch.tiles": 20,
        "trainable": ("decoder.*", "projector.*", "refusion.*", *(["image_newline"] if name == "llava" else [])),
        "frozen_dtype": "float32",
        "optimizer.lr": 8e-3,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
        "loss_chunk": 64,
        "tensorboard": False,
    }
    return TrainConfig(model=small_config(name)).replace(fields | changes)
