"""Systems that benchmarks/accuracy/reading.py compares: pooling, Vision Remember and TokenPacker on pages to read.

All start from the pretrained parts in vr_jax/data/demo, a tiny SigLIP and a tiny Qwen2, and train in the paper's two
phases: captions with encoder and decoder frozen, then questions with the encoder frozen.

Variants: SYSTEM_phase1 and SYSTEM_phase2, where SYSTEM is pooling_9, vision_remember_9 or token_packer_9, which keep a
ninth of the patches as vision tokens, or pooling_16 or vision_remember_16, which keep a sixteenth.
"""

import copy

from ml_collections import ConfigDict

REFUSION = {
    "name": "vision_remember",
    "insert_after": (1, 2),  # the paper's layers 1 and 4 of 24 at this depth
    "levels": (2, 3, 4),
    "interaction": "local",
    "cross_attention": "absorbed",
    "kernel": "auto",
    "cross_heads": 8,
    "points": 4,  # of the deformable interaction only
    "self_attention": True,
    "self_heads": None,  # those of the decoder: 2
    "up": "linear",
    "residual_gate": "none",
    "init": "torch_default",  # The attention forms in fewer updates than with "zero_out".
    "feature_norm": "per_level",
    "order": "cross_self",
    "ffn_multiplier": 0,
    "self_scope": "image",
    "newline_in_self": False,
    "text_pool": "first_turn",
    "self_positions": "none",
    "shared_weights": False,
}

TOKEN_PACKER = {
    "name": "token_packer",
    "stride": 3,
    "levels": (1, 2, 3, 4),  # the paper's layers 12, 16, 22 and 23 of 24 at this depth
    "heads": 4,
}

PHASE1 = {
    "model": {
        "encoder": {
            "name": "siglip",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_layers": 4,
            "num_heads": 4,
            "image_size": 96,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
        "decoder": {
            "name": "transformer",
            "vocab_size": 288,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_layers": 8,
            "num_heads": 2,
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
            "initializer_range": 0.1,
        },
        "projector": {"name": "pool", "stride": 3},  # 12 x 12 patches become 4 x 4 vision tokens
        "refusion": REFUSION,
        "pruning": None,
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
        },
        "vision_feature_layer": 4,
        "image_token_id": None,
        "template": "qwen_1_5",
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
    # A row holds one caption with its image, at most 52 tokens. Then no place for an image is empty.
    "batch": {"rows": 32, "tokens": 56, "tiles": 1, "accumulation": 1, "raise_rows": "refuse"},
    "samples_per_step": 32,
    "epochs": 1.0,
    "steps": 100,
    "trainable": ("projector.*", "refusion.*"),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "frozen_dtype": "float32",
    "optimizer": {
        "name": "muon",  # The attention that finds a patch forms in half of AdamW's updates.
        "lr": 0.06,
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
        "lr_groups": (("*.bias", 0.01), ("*.scale", 0.01)),  # These are left to AdamW.
        "weight_decay_groups": (),
    },
    "loss_chunk": 512,
    "seed": 0,
    "mesh": {"replica": -1, "fsdp": -1, "tensor": 1, "slices": 0},  # -1 and -1: chosen by the widths of the model
    "validation": {},
    "checkpoint": {"every": 10_000, "keep_last": 1, "keep_best": 0, "best": "loss"},
    "tensorboard": False,
    "trackers": (),
    "wandb": {"project": "vr_jax", "entity": None, "name": None, "group": None, "tags": (), "mode": None},
    "trackio": {"project": "vr_jax", "name": None, "group": None, "space": None},
    "profile": {"first_step": 0, "steps": 0},
}

# A row holds three questions about a page with their answers, at most 65 tokens with the image.
PHASE2 = {
    "data": PHASE1["data"] | {"template": "chat"},
    "batch": PHASE1["batch"] | {"tokens": 72},
    "steps": 50,
    "trainable": ("decoder.*", "projector.*", "refusion.*"),
    "lora": {"rank": 0, "alpha": 16.0, "targets": ("decoder.*",), "rslora": False},
    "optimizer": PHASE1["optimizer"]
    | {"lr": 0.006, "lr_groups": (("*.bias", 1e-3), ("*.scale", 1e-3), ("decoder.embed.*", 1e-3))},
}

# Projector, and whether Vision Remember re-reads.
SYSTEMS = {
    "pooling_9": ({"name": "pool", "stride": 3}, False),
    "vision_remember_9": ({"name": "pool", "stride": 3}, True),
    "token_packer_9": (TOKEN_PACKER, False),
    "pooling_16": ({"name": "pool", "stride": 4}, False),
    "vision_remember_16": ({"name": "pool", "stride": 4}, True),
}
VARIANTS = tuple(f"{system}_{phase}" for system in SYSTEMS for phase in ("phase1", "phase2"))


def get_config(variant: str = "vision_remember_9_phase1") -> ConfigDict:
    """Returns the settings of a run."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    system, _, phase = variant.rpartition("_")
    config = copy.deepcopy(PHASE1 | (PHASE2 if phase == "phase2" else {}))
    config["model"]["projector"], remembers = copy.deepcopy(SYSTEMS[system])
    if not remembers:
        config["model"]["refusion"] = None
        config["trainable"] = tuple(glob for glob in config["trainable"] if glob != "refusion.*")
        if phase == "phase1" and config["model"]["projector"]["name"] == "pool":
            config["optimizer"]["lr_groups"] = (("*.bias", 0.01),)  # This projector has no scales.
    return ConfigDict(config)
