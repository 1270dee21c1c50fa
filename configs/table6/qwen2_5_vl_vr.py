"""Qwen2.5-VL-3B with Vision Remember (paper, Table 6).

Phase 1 aligns the projector and the re-fusion blocks on captions (LLaVA's 558K). Phase 2 tunes all but the encoder on
instructions (LLaVA-NeXT-Data, 779K). `PHASE1` and `PHASE2` hold every setting of their run, with the same fields in the
same order. `qwen2_5_vl.py` is the same without Vision Remember.

The paper retrains this model on LLaVA-NeXT's data and does not say what it starts from. Both starts are possible, and
`init_from` chooses: the converted release of the whole model, whose re-fusion blocks alone are new; or its encoder and
its language model alone, so that the projector is new too, as the paper describes its own model's training.
docs/train.md shows the commands of both. The batch sizes and learning rates are those of the paper's own model in both
phases; for a released model a learning rate of about 1e-5 in phase 2 keeps more of what it has learned.

Variants: phase1, phase2.
"""

import copy

from ml_collections import ConfigDict

ENCODER = {  # Qwen2.5-VL's vision tower, as published
    "name": "qwen2_5_vision",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_layers": 32,
    "num_heads": 16,
    "image_size": 112,  # an attention window
    "patch_size": 14,
    "full_attention_layers": (7, 15, 23, 31),
    "rope_theta": 1e4,
}
DECODER = {  # the language model of Qwen2.5-VL-3B-Instruct, as published
    "name": "transformer",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_layers": 36,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_width": None,  # hidden_size / num_heads
    "attention_bias": True,
    "query_key_norm": False,
    "rope_theta": 1e6,
    "rope_sections": (16, 24, 24),
    "rms_norm_eps": 1e-6,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
# 2 x 2 patches are one vision token, 28 x 28 pixels.
PROJECTOR = {"name": "merger", "stride": 2}
REFUSION = {
    "name": "vision_remember",
    "insert_after": (1, 4),
    "levels": (8, 16, 24),  # after three of the four layers of full attention
    "interaction": "local",
    "cross_attention": "absorbed",
    "kernel": "auto",
    "cross_heads": None,  # one for 128 of the 3 * 1280 channels: 30
    "points": 4,  # of the deformable interaction only
    "self_attention": True,
    "self_heads": None,  # those of the decoder: 16
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

PHASE1 = {
    "model": {
        "encoder": ENCODER,
        "decoder": DECODER,
        "projector": PROJECTOR,
        "refusion": REFUSION,
        "pruning": None,
        "image": {
            "tile_size": 112,  # an attention window
            "aspect_ratio": "native",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 56 * 56,
            "max_pixels": 448 * 448,  # at most 256 vision tokens: captions need no more
            "slice_size": 448,
            "max_slices": 9,
            "image_mean": (0.48145466, 0.4578275, 0.40821073),
            "image_std": (0.26862954, 0.26130258, 0.27577711),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        },
        "vision_feature_layer": 32,
        "image_token_id": 151_655,
        "template": "qwen2_vl",
        "dtype": "bfloat16",
        "attention": "auto",
        "remat": "full",
    },
    "init_from": "",  # the converted release, or the directories of its encoder and decoder
    "allow_unused": (),
    "allow_different": (),
    "tokenizer": "",
    "data": {
        "path": "",  # blip_laion_cc_sbu_558k.json
        "images": "",
        "format": "",
        "split": "train",
        "follow_links": False,
        "sources": (),
        "template": "plain",
        "label_quirk": True,
        "packing": True,
        "shuffle": True,
        "exif_rotation": False,
        "workers": 4,
        "allow_changed": False,
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {
        # The paper's batch size is 256: 64 rows of four samples.
        "rows": 256 // 4,
        # An image of 400 x 300 pixels has 14 x 11 vision tokens and two markers; a caption and its separators have 15
        # tokens on average (benchmarks/input/packing.py). Four such samples, in blocks of the attention kernels.
        "tokens": 768,
        # That image has 4 x 3 windows. A row has room for more, because windows at the edges are partial.
        "tiles": 64,
        "accumulation": 1,
        "raise_rows": "refuse",  # where the mesh needs more rows than these
    },
    "samples_per_step": 256,
    "epochs": 1.0,
    "steps": 0,
    "trainable": ("projector.*", "refusion.*"),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "bfloat16",
    "optimizer": {
        "name": "adamw",
        "lr": 1e-3,
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
    "loss_chunk": 1024,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 500, "keep_last": 3, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

PHASE2 = {
    "model": {
        "encoder": ENCODER,
        "decoder": DECODER,
        "projector": PROJECTOR,
        "refusion": REFUSION,
        "pruning": None,
        "image": {
            "tile_size": 112,  # an attention window
            "aspect_ratio": "native",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 56 * 56,
            "max_pixels": 1280 * 28 * 28,  # at most 1,280 vision tokens
            "slice_size": 448,
            "max_slices": 9,
            "image_mean": (0.48145466, 0.4578275, 0.40821073),
            "image_std": (0.26862954, 0.26130258, 0.27577711),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        },
        "vision_feature_layer": 32,
        "image_token_id": 151_655,
        "template": "qwen2_vl",
        "dtype": "bfloat16",
        "attention": "auto",
        "remat": "full",
    },
    "init_from": "",  # phase 1's model directory
    "allow_unused": (),
    "allow_different": (),
    "tokenizer": "",
    "data": {
        "path": "",  # the Parquet files of LLaVA-NeXT-Data
        "images": "",
        "format": "",
        "split": "train",
        "follow_links": False,
        "sources": (),
        "template": "chat",
        "label_quirk": True,
        "packing": True,
        "shuffle": True,
        "exif_rotation": False,
        "workers": 4,
        "allow_changed": False,
        "allow_other_weights": False,
        "max_skipped": 0.01,
        "max_pixels": 89_478_485,
    },
    "batch": {
        # The paper's batch size is 32: eight rows of four samples.
        "rows": 32 // 4,
        # An image of 640 x 480 pixels has 23 x 17 vision tokens, and a sample of the 779K has 257 tokens of text on
        # average (benchmarks/input/packing.py). Four such samples are 2,600 tokens; a row holds the largest image and
        # the longest text too.
        "tokens": 3072,
        # That image has 6 x 5 windows. A row has room for a tenth more, so that it is full in tokens first, and for
        # long images, whose windows are partial.
        "tiles": 144,
        "accumulation": 1,
        "raise_rows": "refuse",  # where the mesh needs more rows than these
    },
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 0,
    "trainable": ("decoder.*", "projector.*", "refusion.*"),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "bfloat16",
    "optimizer": {
        "name": "adamw",
        "lr": 2e-4,
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
    "loss_chunk": 1024,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 500, "keep_last": 3, "keep_best": 1, "best": "loss"},
    "tensorboard": True,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

PHASES = {"phase1": PHASE1, "phase2": PHASE2}


def get_config(variant: str = "phase1") -> ConfigDict:
    """Returns the settings of a phase."""
    if variant not in PHASES:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(PHASES)}")
    return ConfigDict(copy.deepcopy(PHASES[variant]))
