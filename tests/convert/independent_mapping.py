"""A second mapping of torch's names to ours, written apart from `vr_jax.convert`, so that the two check each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

Weights = Mapping[str, np.ndarray]

SIGLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QWEN2_LAYER = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def under(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _module(theirs: str, weights: Weights) -> dict[str, np.ndarray]:
    """The parameters of one Linear or norm, by our names."""
    out = {}
    if theirs + ".weight" in weights:
        weight = weights[theirs + ".weight"]
        out["kernel" if weight.ndim == 2 else "scale"] = weight.T if weight.ndim == 2 else weight
    if theirs + ".bias" in weights:
        out["bias"] = weights[theirs + ".bias"]
    return out


def _stages(table: Mapping[str, str], weights: Weights, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    out = {}
    for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for ours, theirs in table.items():
            layers = [_module(f"{i}.{theirs}", weights) for i in range(start, stop)]
            for name in layers[0]:  # Qwen3 alone has norms of queries and keys
                out[f"stages.{stage}.{ours}.{name}"] = np.stack([layer[name] for layer in layers])
    return out


def siglip(weights: Weights, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """From `SiglipVisionModel`'s state dict; its pooling head is dropped."""
    patch = weights["embeddings.patch_embedding.weight"]  # (D, 3, p, p)
    return {
        "patch_embed.kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
        "patch_embed.bias": weights["embeddings.patch_embedding.bias"],
        "position_embedding": weights["embeddings.position_embedding.weight"],
        "post_norm.scale": weights["post_layernorm.weight"],
        "post_norm.bias": weights["post_layernorm.bias"],
        **_stages(SIGLIP_BLOCK, under(weights, "encoder.layers."), bounds),
    }


def clip(weights: Weights, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """From `CLIPVisionModel`'s state dict; its projection is dropped."""
    patch = weights["embeddings.patch_embedding.weight"]  # (D, 3, p, p)
    return {
        "patch_embed.kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
        "class_embedding": weights["embeddings.class_embedding"],
        "position_embedding": weights["embeddings.position_embedding.weight"],
        "pre_norm.scale": weights["pre_layrnorm.weight"],
        "pre_norm.bias": weights["pre_layrnorm.bias"],
        "post_norm.scale": weights["post_layernorm.weight"],
        "post_norm.bias": weights["post_layernorm.bias"],
        **_stages(SIGLIP_BLOCK, under(weights, "encoder.layers."), bounds),
    }


def qwen2(weights: Weights, bounds: Sequence[int]) -> dict[str, np.ndarray]:
    """From `Qwen2Model`'s state dict, with `lm_head.weight` beside it if untied."""
    out = {
        "embed.embedding": weights["embed_tokens.weight"],
        "norm.scale": weights["norm.weight"],
        **_stages(QWEN2_LAYER, under(weights, "layers."), bounds),
    }
    if "lm_head.weight" in weights:
        out["lm_head.kernel"] = weights["lm_head.weight"].T
    return out


def vision_remember(weights: Weights) -> dict[str, np.ndarray]:
    """From the names of `golden/methods/vr_reference`; attention is packed as in torch.nn.MultiheadAttention."""
    out = {}
    for ours, theirs in {"ln_q": "ln_q", "ln_s": "ln_s", "up": "w_up", "down": "w_dn"}.items():
        out |= {f"{ours}.{name}": value for name, value in _module(theirs, weights).items()}
    levels = len({name for name in weights if name.startswith("ln_f.") and name.endswith(".weight")})
    for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
        out[f"ln_f.{ours}"] = np.stack([weights[f"ln_f.{level}.{theirs}"] for level in range(levels)])
    for attn in ("cross_attn", "self_attn"):
        kernels = np.split(weights[f"{attn}.in_proj_weight"], 3)
        biases = np.split(weights[f"{attn}.in_proj_bias"], 3)
        for name, kernel, bias in zip("qkv", kernels, biases, strict=True):
            out |= {f"{attn}.{name}.kernel": kernel.T, f"{attn}.{name}.bias": bias}
        out |= {f"{attn}.out.{name}": value for name, value in _module(f"{attn}.out_proj", weights).items()}
    return out
