"""Models small enough for two CPU cores, trained from scratch on real images with the real Qwen2 tokenizer.

benchmarks/accuracy/real_charts.py trains them. Nothing is pretrained here, so phase 1 of the LLaVA (captions) trains
the encoder and the decoder too. Phase 2 (questions about charts) freezes the encoder, as the paper does. The other
variants are a small Qwen2.5-VL and a small MiniCPM-V with Vision Remember, which learn the questions about charts in
one phase that trains everything. A model memorises its few images; it does not generalise.

Variants: phase1, phase2, qwen2_5_vl, minicpm_v.
"""

import copy

from ml_collections import ConfigDict

REFUSION = {
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
}

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
    "refusion": REFUSION,
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
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 4, "tokens": 256, "tiles": 6, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 22,
    "epochs": 1.0,
    "steps": 60,
    "trainable": ("*",),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "adamw",
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "first_moment_dtype": "float32",
        "decay_rate": 0.8,  # of adafactor only
        "clipping_threshold": 1.0,  # of adafactor only
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
        "weight_decay_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
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
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 11, "tokens": 512, "tiles": 15, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 240,
    "trainable": ("decoder.*", "projector.*", "refusion.*", "image_newline"),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "adamw",
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "first_moment_dtype": "float32",
        "decay_rate": 0.8,  # of adafactor only
        "clipping_threshold": 1.0,  # of adafactor only
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
        "weight_decay_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

QWEN2_5_VL = {
    "model": {
        "encoder": {
            "name": "qwen2_5_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "image_size": 32,  # an attention window of 4 x 4 patches
            "patch_size": 8,
            "full_attention_layers": (1, 3),
            "rope_theta": 1e4,
        },
        "decoder": {
            "name": "transformer",
            "vocab_size": 152_000,  # that of the real tokenizer and the tokens of the chat formats
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_width": None,  # hidden_size / num_heads
            "attention_bias": True,
            "query_key_norm": False,
            "rope_theta": 1e6,
            "rope_sections": (2, 3, 3),
            "rms_norm_eps": 1e-6,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        "projector": {"name": "merger", "stride": 2},
        "refusion": REFUSION | {"levels": (2, 4)},  # the states after the layers of full attention
        "pruning": None,
        "image": {
            "tile_size": 32,
            "aspect_ratio": "native",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 3136,
            "max_pixels": 80 * 80,
            "slice_size": 448,
            "max_slices": 9,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        },
        "vision_feature_layer": 4,
        "image_token_id": None,
        "template": "qwen2_vl",
        "dtype": "float32",
        "attention": "auto",
        "remat": "none",
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
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 4, "tokens": 608, "tiles": 56, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 160,
    "trainable": ("*",),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "adamw",
        "lr": 4e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "first_moment_dtype": "float32",
        "decay_rate": 0.8,  # of adafactor only
        "clipping_threshold": 1.0,  # of adafactor only
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
        "weight_decay_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

MINICPM_V = {
    "model": {
        "encoder": {
            "name": "siglip_slices",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "image_size": 64,  # a slot of 8 x 8 patches
            "patch_size": 8,
            "position_grid": 6,
            "layer_norm_eps": 1e-6,
        },
        "decoder": {
            "name": "transformer",
            "vocab_size": 152_000,  # that of the real tokenizer and the tokens of the chat formats
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_width": None,  # hidden_size / num_heads
            "attention_bias": False,
            "query_key_norm": False,
            "rope_theta": 1e4,
            "rope_sections": None,
            "rms_norm_eps": 1e-5,
            "embedding_scale": 4.0,
            "residual_scale": 1.4 / 4**0.5,
            "logit_scale": 0.5,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
        },
        # 3 x 3 queries make the vision tokens of a slice. `stride` has no effect beside `queries`.
        "projector": {"name": "resampler", "stride": 3, "queries": 3, "heads": 4, "adaptive": True},
        "refusion": REFUSION,
        "pruning": None,
        "image": {
            "tile_size": 64,
            "aspect_ratio": "slices",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "slice_size": 56,
            "max_slices": 3,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        },
        "vision_feature_layer": 5,  # the last state after the final LayerNorm
        "image_token_id": None,
        "template": "minicpm_v",
        "dtype": "float32",
        "attention": "auto",
        "remat": "none",
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
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {"rows": 4, "tokens": 624, "tiles": 28, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 160,
    "trainable": ("*",),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "adamw",
        "lr": 6e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "first_moment_dtype": "float32",
        "decay_rate": 0.8,  # of adafactor only
        "clipping_threshold": 1.0,  # of adafactor only
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "lr_groups": (),
        "weight_decay_groups": (),
    },
    "loss_chunk": 256,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

VARIANTS = {"phase1": PHASE1, "phase2": PHASE2, "qwen2_5_vl": QWEN2_5_VL, "minicpm_v": MINICPM_V}


def get_config(variant: str = "phase1") -> ConfigDict:
    """Returns the settings of a run."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    return ConfigDict(copy.deepcopy(VARIANTS[variant]))
