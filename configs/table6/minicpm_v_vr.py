"""MiniCPM-V-3B (MiniCPM-V 2.0) with Vision Remember (paper, Table 6).

Phase 1 aligns the projector and the re-fusion blocks on captions (LLaVA's 558K). Phase 2 tunes all but the encoder on
instructions (LLaVA-NeXT-Data, 779K). `PHASE1` and `PHASE2` hold every setting of their run, with the same fields in the
same order. `minicpm_v.py` is the same without Vision Remember. The paper's MiniCPM-V-3B may be version 1.0 or 2.0; both
have MiniCPM as language model and a resampler, and 2.0 is the one whose weights are in use.

The paper retrains this model on LLaVA-NeXT's data and does not say what it starts from. Both starts are possible, and
`init_from` chooses: the converted release of the whole model, whose re-fusion blocks alone are new; or its encoder and
its language model alone, so that the projector is new too, as the paper describes its own model's training.
docs/train.md shows the commands of both. The batch sizes and learning rates are those of the paper's own model in both
phases; for a released model a learning rate of about 1e-5 in phase 2 keeps more of what it has learned.

Variants: phase1, phase2.
"""

import copy

from ml_collections import ConfigDict

ENCODER = {  # SigLIP-so400m/14, as MiniCPM-V-2 has it
    "name": "siglip_slices",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_layers": 26,  # the last of 27 is dropped
    "num_heads": 16,
    "image_size": 476,  # a slot of 34 x 34 patches
    "patch_size": 14,
    "position_grid": 27,
    "layer_norm_eps": 1e-6,
}
DECODER = {  # MiniCPM-2.4B, as MiniCPM-V-2 has it
    "name": "transformer",
    "vocab_size": 122_753,
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_layers": 40,
    "num_heads": 36,
    "num_kv_heads": 36,
    "head_width": None,  # hidden_size / num_heads
    "attention_bias": False,
    "query_key_norm": False,
    "rope_theta": 1e4,
    "rope_sections": None,
    "rms_norm_eps": 1e-5,
    "embedding_scale": 12.0,
    "residual_scale": 1.4 / 40**0.5,
    "logit_scale": 256 / 2304,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
# 8 x 8 queries make the vision tokens of a slice. `stride` has no effect beside `queries`.
PROJECTOR = {"name": "resampler", "stride": 3, "queries": 8, "heads": 18, "adaptive": True}
REFUSION = {
    "name": "vision_remember",
    "insert_after": (1, 4),
    "levels": (8, 17, 26),
    "interaction": "local",
    "cross_attention": "absorbed",
    "kernel": "auto",
    "cross_heads": None,  # one for 128 of the 3 * 1152 channels: 27
    "points": 4,  # of the deformable interaction only
    "self_attention": True,
    "self_heads": None,  # those of the decoder: 36
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
            "tile_size": 476,  # room for a slice of 34 x 34 patches
            "aspect_ratio": "slices",
            "grids": (),
            "max_tiles": 9,
            "unpad": False,
            "unpad_rounding": "truncate",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "slice_size": 448,
            "max_slices": 1,  # the whole image is one slice
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "rescale_factor": 1 / 255,
            "resample": "bicubic",
        },
        "vision_feature_layer": 27,  # the last state after the final LayerNorm
        "image_token_id": None,
        "template": "minicpm_v",
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
        # The paper's batch size is 256. A caption has one slice, so rows of four slots hold at most four samples.
        "rows": 256 // 4,
        # A sample has 64 vision tokens, two markers and, with its separators, a caption of 15 tokens on average
        # (benchmarks/input/packing.py). Packing puts long captions beside short ones.
        "tokens": 4 * (66 + 17),
        "tiles": 4,
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
            "tile_size": 476,  # room for a slice of 34 x 34 patches
            "aspect_ratio": "slices",
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
        "vision_feature_layer": 27,  # the last state after the final LayerNorm
        "image_token_id": None,
        "template": "minicpm_v",
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
        # An image of 640 x 480 pixels has an overview and two slices with 66 tokens each, and a sample of the 779K has
        # 257 tokens of text on average (benchmarks/input/packing.py). Four such samples fit, and the longest text.
        "tokens": 2048,
        # A row holds the ten slices of the largest image, and more than the slices that those tokens bring.
        "tiles": 16,
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
