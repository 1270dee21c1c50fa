"""The demo: a tiny LLaVA-VR learns to read generated charts, tables and words in minutes on two CPU cores.

Everything is trained from scratch. Variant `uncompressed`: every patch is a vision token and there is no Vision
Remember; it is the model that the pruners work on.
"""

import copy

from ml_collections import ConfigDict

CONFIG = {
    "model": {
        "encoder": {
            "name": "siglip",
            "hidden_size": 72,
            "intermediate_size": 216,
            "num_layers": 3,
            "num_heads": 3,
            "image_size": 48,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
        "decoder": {
            "name": "transformer",
            "vocab_size": 512,  # the demo's tokenizer has a token for each letter, digit and common word
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_width": None,  # hidden_size / num_heads
            "attention_bias": True,
            "query_key_norm": False,
            "rope_theta": 1e4,
            "rope_sections": None,
            "rms_norm_eps": 1e-6,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,  # about 96 ** -0.5: a narrow model that starts from random weights
        },
        "projector": {"name": "pool", "stride": 2},  # 6 x 6 patches become 3 x 3 vision tokens
        "refusion": {
            "name": "vision_remember",
            "insert_after": (1, 2),
            "levels": (1, 2, 3),
            "interaction": "local",
            "cross_attention": "absorbed",
            "kernel": "auto",
            "cross_heads": None,  # one for 128 of the 3 * 72 channels: 1
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
        "image": {
            "tile_size": 48,
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
        },
        "vision_feature_layer": 3,
        "image_token_id": None,
        "template": "qwen_1_5",
        "dtype": "float32",
        "attention": "auto",
        "remat": "none",
    },
    "init_from": "",
    "allow_unused": (),
    "allow_different": (),
    "tokenizer": "demo",
    "data": {
        "path": "",
        "images": "",
        "format": "demo",
        "split": "train",
        "follow_links": False,
        "sources": (),
        "demo": {"size": 50_000, "seed": 0, "turns": 4},
        "template": "chat",
        "label_quirk": False,  # the targets are the answers only
        "packing": True,
        "shuffle": True,
        "exif_rotation": False,
        "workers": 0,
        "allow_changed": False,
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    # A sample has about 70 tokens and one tile, so a row of 256 tokens holds three or four: 66 in the 20 rows.
    "batch": {"rows": 20, "tokens": 256, "tiles": 4, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 66,
    "epochs": 1.0,
    "steps": 700,
    "trainable": ("*",),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "adamw",
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "first_moment_dtype": "float32",
        "decay_rate": 0.8,  # of adafactor only
        "clipping_threshold": 1.0,  # of adafactor only
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
        "weight_decay_groups": (),
    },
    "loss_chunk": 512,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 500, "keep_last": 2, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}
UNCOMPRESSED = {"projector": {"name": "mlp", "stride": 1}, "refusion": None}


def get_config(variant: str = "") -> ConfigDict:
    """Returns the demo's settings, or those of the uncompressed model."""
    if variant not in ("", "uncompressed"):
        raise ValueError(f"no variant {variant!r}: expected none, or 'uncompressed'")
    config = copy.deepcopy(CONFIG)
    if variant:
        config["model"] |= UNCOMPRESSED
    return ConfigDict(config)
