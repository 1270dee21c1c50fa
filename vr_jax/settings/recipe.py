"""The fields of a training config, and the paper's two phases (sections 3.4 and 4.1; methods.md 1.6).

A recipe is an ml_collections ConfigDict; every field can be set on the command line (`--config.optimizer.lr=1e-4`)."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from ml_collections import ConfigDict, config_dict

from vr_jax.errors import ConfigError
from vr_jax.experiments import paper
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.qwen2 import Qwen2Config

VARIANTS = ("phase1", "phase2", "phase1_baseline", "phase2_baseline")


def base(model: VlmConfig) -> ConfigDict:
    """Every field with its default. Empty strings are to be filled in, or mean what the comment says."""
    return ConfigDict(
        {
            "model": model_fields(model),
            "init_from": "",  # model directories, comma-separated; what none of them holds starts random
            "allow_unused": (),  # path prefixes in those directories that the model may lack
            "tokenizer": "",  # its directory, or "demo"; default: the first of init_from that has one
            "data": {
                "path": "",  # file, folder or glob pattern (docs/data.md)
                "images": "",  # image folder; default: that of the file
                "format": "",  # default: by the file's name; "demo" generates images
                "split": "train",
                "follow_links": False,  # whether symbolic links may lead out of the image folder
                "demo": {"size": 10_000, "seed": 0, "turns": 1},  # the generated images of the format "demo"
                "template": "qwen_1_5",
                "label_quirk": True,  # LLaVA's targets (methods.md 1.4)
                "packing": True,
                "shuffle": True,
                "workers": 4,  # processes that decode and tokenise; 0: threads of this one
                "max_skipped": 0.01,  # share of unusable samples above which training stops
            },
            # Static shapes: `rows` of `tokens` and `tiles` slots in the whole (global) batch of one update.
            "batch": {"rows": 8, "tokens": 2048, "tiles": 10, "accumulation": 1},
            # Samples that the rows of an update hold on average: the paper's batch size. Sets the number of updates.
            "samples_per_step": 8,
            "epochs": 1.0,
            "steps": 0,  # number of updates; 0: epochs * samples / samples_per_step
            "trainable": (
                "*",
            ),  # globs of parameter paths (docs/design/architecture.md#parameter-paths); all others are frozen
            "frozen_dtype": "bfloat16",
            "optimizer": {
                "lr": 1e-3,
                "schedule": "cosine",
                "warmup_ratio": 0.03,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "lr_groups": (),  # ((glob, learning rate), ...)
            },
            "loss_chunk": 1024,  # positions of one device whose logits exist at a time
            "seed": 0,
            "mesh": {"replica": 1, "fsdp": -1, "tensor": 1},  # -1: the remaining devices
            "checkpoint": {"every": 500, "keep_last": 3, "keep_best": 1},
            "tensorboard": True,
            "profile": {"first_step": 0, "steps": 0},  # trace these updates into <workdir>/profile
            "eval": {"batch_size": 16},  # of eval.py, whose flags win over these (docs/evaluate.md)
        }
    )


def model_fields(model: VlmConfig) -> ConfigDict:
    """`VlmConfig.to_dict()` with tuples, and typed placeholders where a number may be absent."""

    def fields(value: Any) -> Any:
        if isinstance(value, dict):
            return ConfigDict({key: fields(part) for key, part in value.items()})
        return tuple(fields(part) for part in value) if isinstance(value, list | tuple) else value

    config = fields(model.to_dict())
    for kind in ("projector", "refusion"):
        for name, value in config[kind].items() if config[kind] is not None else ():
            if value is None:  # every optional field of a method is a number
                config[kind][name] = config_dict.placeholder(int)
    return config


def llava_vr(variant: str, text: Qwen2Config) -> ConfigDict:
    """LLaVA-VR with SigLIP-L/16-384, 1/9 average pooling and Vision Remember after decoder layers 1 and 4.

    variant: "phase1" or "phase2", with "_baseline" for the same model without Vision Remember."""
    if variant not in VARIANTS:
        raise ValueError(f"no recipe {variant!r}: expected one of {', '.join(VARIANTS)}")
    phase, _, baseline = variant.partition("_")
    system = paper.BASELINE if baseline else paper.VISION_REMEMBER
    return PHASES[phase](system.config(text, "anyres9"))


def table_row(variant: str) -> ConfigDict:
    """A row of the paper's tables: "table/row/size/phase", e.g. "table1/pooling_vr/1.5b/phase2"; size defaults to 0.5b,
    phase to phase1.

    A training-free row trains the uncompressed model; `eval.pruning` holds what eval.py then switches on.
    Raises ConfigError naming what is unknown and what is known."""
    parts = variant.split("/")
    if not 2 <= len(parts) <= 4:
        raise ConfigError(f"{variant!r}: expected table/row/size/phase, e.g. table1/pooling_vr/1.5b/phase2")
    table, row, size, phase = (*parts, *("0.5b", "phase1")[len(parts) - 2 :])
    system = paper.system(table, row)
    for name, value, known in (("size", size, paper.TEXTS), ("phase", phase, PHASES)):
        if value not in known:
            raise ConfigError(f"{variant}: no {name} {value!r}: expected one of {', '.join(known)}")
    trained = dataclasses.replace(system, pruning=None)
    config = PHASES[phase](trained.config(paper.TEXTS[size], paper.TABLES[table].image))
    if system.pruning is not None:
        config.eval.pruning = json.dumps(dict(system.pruning))
    return config


def _phase1(model: VlmConfig) -> ConfigDict:
    """Alignment: CC-558K captions, projector and re-fusion block."""
    config = base(dataclasses.replace(model, image=single_tile(), **PAPER_COMPUTE))
    config.data.template = "plain"
    # blip_laion_cc_sbu_558k.json: one tile each, so a row holds at most four samples, an update 256. A caption and its
    # separators have 15 tokens on average (benchmarks/input/packing.py); packing puts long ones beside short ones.
    config.batch = ConfigDict({"rows": 64, "tokens": 4 * (model.cells_per_tile + 17), "tiles": 4, "accumulation": 1})
    config.samples_per_step = 256
    config.optimizer.lr = 1e-3
    config.trainable = ("projector.*", *(("refusion.*",) if model.refusion else ()))
    return config


def _phase2(model: VlmConfig) -> ConfigDict:
    """Instruction tuning: LLaVA-NeXT-Data (779K); everything but the encoder."""
    config = base(dataclasses.replace(model, **PAPER_COMPUTE))
    config.data.template = "qwen_1_5"
    # A sample of the 779K has 4.85 tiles, and for each of them 53 tokens of text and 87 % of its cells
    # (benchmarks/input/packing.py). A row's token slots are for four, at least for the longest text, in blocks of the
    # attention kernels; a tenth more tile slots than these bring, so that a row is full in tokens first.
    tokens_per_tile = 0.87 * model.cells_per_tile + 53
    tokens = max(2048, 512 * round(4 * 4.85 * tokens_per_tile / 512))
    tiles = math.ceil(1.1 * tokens / tokens_per_tile)
    config.batch = ConfigDict({"rows": 8, "tokens": tokens, "tiles": tiles, "accumulation": 1})
    config.samples_per_step = 32 if model.cells_per_tile >= 64 else 39  # 1/16: more than four fit into that length
    config.optimizer.lr = 2e-4
    config.trainable = ("decoder.*", "projector.*", "image_newline", *(("refusion.*",) if model.refusion else ()))
    return config


PAPER_COMPUTE: dict[str, Any] = {"dtype": "bfloat16", "remat": "full"}
PHASES = {"phase1": _phase1, "phase2": _phase2}
