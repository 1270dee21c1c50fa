"""A model small enough for two CPU cores, trained from scratch on real images with the real Qwen2 tokenizer.

benchmarks/accuracy/real_charts.py trains it. Nothing is pretrained here, so phase 1 (captions) trains the encoder and
the decoder too. Phase 2 (questions about charts) freezes the encoder, as the paper does. The model memorises its few
images; it does not generalise.

Variants: phase1, phase2.
"""

import copy

from ml_collections import ConfigDict

MODEL = {
    "encoder": {
        "name": "siglip",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "image_size": 96,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    },
    "decoder": {
        "name": "transformer",
        "vocab_size": 151_936,  # that of the real tokenizer
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_width": None,  # hidden_size / num_heads
        "attention_bias": True,
        "query_key_norm": False,
        "rope_theta": 1e6,
        "rope_sections": None,
        "rms_norm_eps": 1e-6,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    "projector": {"name": "pool", "stride": 3},  # 12 x 12 patches become 4 x 4 vision tokens
    "refusion": {
        "name": "vision_remember",
        "insert_after": (1, 3),
        "levels": (2, 3, 4),
        "interaction": "local",
        "cross_attention": "absorbed",
        "kernel": "auto",
        "cross_heads": None,  # one for 128 of the 3 * 64 channels: 1
        "points": 4,  # of the deformable interaction only
        "self_attention": True,
        "self_heads": None,  # those of the decoder: 4
        "up": "linear",
        "residual_gate": "none",
        "init": "zero_out",
        "feature_norm": "per_level",
        "order": "cross_self",
        "ffn_multiplier": 0,
        "self_scope": "image",
        "newline_in_self": False,
        "text_pool": "first_turn",
        "self_positions": "none",
        "shared_weights": False,
    },
    "pruning": None,
    "vision_feature_layer": 4,
    "image_token_id": None,
    "template": "qwen_1_5",
    "dtype": "float32",
    "attention": "auto",
    "remat": "none",
}

PHASE1 = {
    "model": MODEL
    | {
        "image": {
            "tile_size": 96,
            "aspect_ratio": "square",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "slice_size": 448,
            "max_slices": 9,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        }
    },
    "init_from": "",
    "allow_unused": (),
    "allow_different": (),
    "tokenizer": "",
    "data": {
        "path": "",
        "images": "",
        "format": "",
        "split": "train",
        "follow_links": False,
        "sources": (),
        "template": "plain",
        "label_quirk": False,  # the targets are the captions only
        "packing": True,
        "shuffle": True,
        "exif_rotation": False,
        "workers": 0,
        "allow_changed": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 4, "tokens": 256, "tiles": 6, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 22,
    "epochs": 1.0,
    "steps": 60,
    "trainable": ("*",),
    "frozen_dtype": "float32",
    "optimizer": {
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": 1, "fsdp": -1, "tensor": 1},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1},
    "tensorboard": True,
    "profile": {"first_step": 0, "steps": 0},
}

PHASE2 = {
    "model": MODEL
    | {
        "image": {
            "tile_size": 96,
            "aspect_ratio": "anyres",
            "grids": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
            "max_tiles": 9,
            "unpad": True,
            "unpad_rounding": "truncate",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "slice_size": 448,
            "max_slices": 9,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        }
    },
    "init_from": "",
    "allow_unused": (),
    "allow_different": (),
    "tokenizer": "",
    "data": {
        "path": "",
        "images": "",
        "format": "",
        "split": "train",
        "follow_links": False,
        "sources": (),
        "template": "chat",
        "label_quirk": False,  # the targets are the answers only
        "packing": True,
        "shuffle": True,
        "exif_rotation": False,
        "workers": 0,
        "allow_changed": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 11, "tokens": 512, "tiles": 15, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 240,
    "trainable": ("decoder.*", "projector.*", "refusion.*", "image_newline"),
    "frozen_dtype": "float32",
    "optimizer": {
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": 1, "fsdp": -1, "tensor": 1},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1},
    "tensorboard": True,
    "profile": {"first_step": 0, "steps": 0},
}

PHASES = {"phase1": PHASE1, "phase2": PHASE2}


def get_config(variant: str = "phase1") -> ConfigDict:
    """Returns the settings of a phase."""
    if variant not in PHASES:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(PHASES)}")
    return ConfigDict(copy.deepcopy(PHASES[variant]))
