"""LLaVA-VR with SigLIP-L/16-384 and Qwen2-7B-Instruct (paper, section 4.1).

Phase 1 aligns the projector and the re-fusion blocks on captions (LLaVA's 558K). Phase 2 tunes all but the encoder on
instructions (LLaVA-NeXT-Data, 779K). `PHASE1` and `PHASE2` hold every setting of their run, with the same fields in the
same order. docs/train.md shows the commands, which add the data and the weights to start from.

Variants: phase1, phase2, and phase1_baseline, phase2_baseline for the same model without Vision Remember.
"""

import copy
import math

from ml_collections import ConfigDict

ENCODER = {  # SigLIP-L/16-384, as published
    "name": "siglip",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_layers": 24,
    "num_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
DECODER = {  # Qwen2-7B-Instruct, as published
    "name": "transformer",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "head_width": None,  # hidden_size / num_heads
    "attention_bias": True,
    "query_key_norm": False,
    "rope_theta": 1e6,
    "rope_sections": None,
    "rms_norm_eps": 1e-6,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
# A tile has 384 / 16 = 24 patches a side. Average pooling of 3 x 3 patches leaves 8 x 8 = 64 vision tokens, 1/9.
PROJECTOR = {"name": "pool", "stride": 3}
# The paper fixes where the blocks act, what they read and local attention. The other fields are choices for what it
# leaves open (docs/design/methods.md#ambiguities).
REFUSION = {
    "name": "vision_remember",
    "insert_after": (1, 4),
    "levels": (7, 15, 23),
    "interaction": "local",
    "cross_attention": "absorbed",
    "kernel": "auto",
    "cross_heads": None,  # one for 128 of the 3 * 1024 channels: 24
    "points": 4,  # of the deformable interaction only
    "self_attention": True,
    "self_heads": None,  # those of the decoder: 28
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
            "tile_size": 384,
            "aspect_ratio": "square",  # the whole image is one tile
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
        "vision_feature_layer": 23,
        "image_token_id": None,
        "template": "qwen_1_5",
        "dtype": "bfloat16",
        "attention": "auto",
        "remat": "full",
    },
    "init_from": "",  # directories of the converted SigLIP and Qwen2
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
        # The paper's batch size is 256. A caption has one tile, so rows of four tiles hold at most four samples.
        "rows": 256 // 4,
        # A sample has 64 vision tokens and, with its separators, a caption of 15 tokens on average
        # (benchmarks/input/packing.py). Four samples of 64 + 17 fit: packing puts long captions beside short ones.
        "tokens": 4 * (64 + 17),
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
            "tile_size": 384,
            "aspect_ratio": "anyres_max",  # the image in the best of the grids, and one tile for the whole
            "grids": tuple((w, h) for w in range(1, 7) for h in range(1, 7) if w * h <= 9),
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
        },
        "vision_feature_layer": 23,
        "image_token_id": None,
        "template": "qwen_1_5",
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
        # A sample of the 779K has 4.85 tiles on average, and for each tile 87 % of its 64 vision tokens, the rest being
        # padding, and 53 tokens of text (benchmarks/input/packing.py). Four samples are rounded to blocks of the
        # attention kernels; a row is at least as long as the longest text.
        "tokens": max(2048, 512 * round(4 * 4.85 * (0.87 * 64 + 53) / 512)),
        # A tenth more tiles than those tokens bring, so that a row is full in tokens before it is full in tiles.
        "tiles": math.ceil(1.1 * 2048 / (0.87 * 64 + 53)),
        "accumulation": 1,
        "raise_rows": "refuse",  # where the mesh needs more rows than these
    },
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 0,
    "trainable": ("decoder.*", "projector.*", "refusion.*", "image_newline"),
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
VARIANTS = ("phase1", "phase2", "phase1_baseline", "phase2_baseline")


def get_config(variant: str = "phase1") -> ConfigDict:
    """Returns the settings of a phase."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    phase, _, baseline = variant.partition("_")
    config = copy.deepcopy(PHASES[phase])
    if baseline:
        config["model"]["refusion"] = None
        config["trainable"] = tuple(glob for glob in config["trainable"] if glob != "refusion.*")
    return ConfigDict(config)
