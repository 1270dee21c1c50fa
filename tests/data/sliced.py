"""A tiny model that cuts images into slices, with a tokenizer that has the markers of MiniCPM-V."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from tokenizers import AddedToken

from tests.minicpm import model_config
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig

_NAMES = ("<unk>", "<s>", "</s>", "<image>", "</image>", "<slice>", "</slice>")


@functools.cache
def tokenizer() -> Any:
    """The demo's tokenizer with the special tokens of MiniCPM-V."""
    found = demo_tokenizer()
    found.add_special_tokens(
        {
            "bos_token": "<s>",
            "unk_token": "<unk>",
            "additional_special_tokens": [AddedToken(name, normalized=False, special=True) for name in _NAMES],
        }
    )
    return found


def sliced_config(**changes: Any) -> VlmConfig:
    """A model with Vision Remember whose slices have about 5 x 5 patches and 2 x 2 tokens, and at most four pieces."""
    decoder = TransformerConfig(
        vocab_size=len(tokenizer()), hidden_size=24, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=2
    )
    base = model_config(
        {"img_size": 84, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        decoder,
        blocks=2,
        queries=2,
        heads=2,
        slot=7,
        refusion=VisionRememberConfig(insert_after=(1,), levels=(1, 2), cross_heads=2),
    )
    image = dataclasses.replace(base.image, slice_size=70, max_slices=4)
    return dataclasses.replace(base, image=image, template="minicpm_v", **changes)


def processor(**changes: Any) -> Processor:
    """A processor of that model."""
    return Processor(tokenizer(), sliced_config(**changes))


def unpacked(slot: np.ndarray, extent: tuple[int, int], patch: int = 14) -> np.ndarray:
    """The pixels of a slice of `extent` rows and columns of patches, taken out of its slot patch by patch."""
    rows, columns = extent
    across = slot.shape[1] // patch
    result = np.zeros((rows * patch, columns * patch, 3), slot.dtype)
    for number in range(rows * columns):
        (y, x), (top, left) = divmod(number, columns), divmod(number, across)
        part = slot[top * patch : (top + 1) * patch, left * patch : (left + 1) * patch]
        result[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = part
    return result
