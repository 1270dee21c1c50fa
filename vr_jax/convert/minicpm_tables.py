"""Rules for the tensors of MiniCPM-V 2.0, with the names of its remote code and of timm (see `tables`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vr_jax.convert.method_tables import DEEPSTACK, LEADING_ONE, PROJECTORS, SVA
from vr_jax.convert.tables import (
    HEAD,
    PATCH,
    TEXT,
    TRANSPOSE,
    VISION_REMEMBER,
    Rule,
    Table,
    linear,
    norm,
    prefixed,
)
from vr_jax.model.projectors.resampler import sine_positions

_BLOCK, _LAYERS = "vpm.blocks.{n}", "encoder.layers"
# The names of timm:models/vision_transformer.py below `vpm.`.
_TOWER: Table = (
    Rule("vpm.pos_embed", ("encoder.position_embedding",), LEADING_ONE),
    Rule("vpm.patch_embed.proj.weight", ("encoder.patch_embed.kernel",), PATCH),
    Rule("vpm.patch_embed.proj.bias", ("encoder.patch_embed.bias",)),
    *norm(f"{_BLOCK}.norm1", f"{_LAYERS}.norm1"),
    *norm(f"{_BLOCK}.norm2", f"{_LAYERS}.norm2"),
    Rule(f"{_BLOCK}.attn.qkv.weight", tuple(f"{_LAYERS}.attn.{x}.kernel" for x in "qkv"), TRANSPOSE),
    Rule(f"{_BLOCK}.attn.qkv.bias", tuple(f"{_LAYERS}.attn.{x}.bias" for x in "qkv")),
    *linear(f"{_BLOCK}.attn.proj", f"{_LAYERS}.attn.out"),
    *linear(f"{_BLOCK}.mlp.fc1", f"{_LAYERS}.mlp.fc1"),
    *linear(f"{_BLOCK}.mlp.fc2", f"{_LAYERS}.mlp.fc2"),
    *norm("vpm.norm", "encoder.post_norm"),
)
TABLES: dict[str, Table] = {
    "encoder": _TOWER,
    "decoder": (*prefixed("llm.model.", TEXT), *prefixed("llm.", HEAD)),
    "projector": prefixed("resampler.", PROJECTORS["resampler"]),
    "refusion": (),
}
# The remote code has no re-fusion blocks. Their names are those of LLaVA's layout, without `model.` before them.
METHODS: dict[str, dict[str, Table]] = {
    "refusion": {
        "deepstack": DEEPSTACK,
        "sva": SVA,
        "vision_remember": prefixed("vision_remember.", VISION_REMEMBER),
    },
}


def query_positions(sections: Mapping[str, Any]) -> Float[np.ndarray, "Q D"]:
    """Returns the positions of the resampler's queries, which MiniCPM-V stores and we compute.

    Args:
        sections: The sections of the model's config.
    """
    side = sections["projector"]["queries"]
    return sine_positions(side, side, sections["decoder"]["hidden_size"])
