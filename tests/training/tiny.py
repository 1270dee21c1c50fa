"""A LLaVA-VR of a few thousand parameters, and batches of noise with its shapes."""

from __future__ import annotations

import numpy as np

from vr_jax.data.types import HostBatch
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import (
    LlavaConfig,
    ProjectorConfig,
    Qwen2Config,
    SiglipConfig,
    VisionRememberConfig,
    single_tile,
)

TILE, CELLS, VOCABULARY = 16, 4, 64


def tiny_config(**changes) -> LlavaConfig:
    """Every width is a multiple of 8, so that each mesh of 8 devices divides it."""
    fields = {
        "vision": SiglipConfig(
            hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, image_size=TILE, patch_size=4
        ),
        "text": Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
        ),
        "projector": ProjectorConfig(stride=2),
        "interlude": VisionRememberConfig(insert_after=(1,), levels=(1, 2), init="torch_default"),
        "image": single_tile(TILE),
        "vision_feature_layer": 2,
    }
    return LlavaConfig(**{**fields, **changes})


def noise_batch(seed: int, rows: int = 8, tokens: int = 24) -> Batch:
    """Each row: two samples of a picture and some text, and padding; numbers of targets differ among rows."""
    rng = np.random.default_rng(seed)
    fields = {
        "tokens": rng.integers(1, VOCABULARY, (rows, tokens)).astype(np.int32),
        "positions": np.zeros((rows, tokens), np.int32),
        "segment_ids": np.zeros((rows, tokens), np.int32),
        "loss_mask": np.zeros((rows, tokens), bool),
        "guide_mask": np.zeros((rows, tokens), bool),
        "vision_cell": np.full((rows, tokens), NO_CELL, np.int32),
        "tile_pixels": rng.integers(0, 256, (rows, 2, TILE, TILE, 3)).astype(np.uint8),
        "tile_segment": np.tile(np.int32([1, 2]), (rows, 1)),
        "tile_image": np.tile(np.int32([1, 2]), (rows, 1)),
    }
    for row in range(rows):
        begin = 0
        for segment, text in enumerate(rng.integers(3, tokens // 2 - CELLS, 2)):
            end = begin + CELLS + text
            fields["positions"][row, begin:end] = np.arange(end - begin)
            fields["segment_ids"][row, begin:end] = segment + 1
            fields["vision_cell"][row, begin : begin + CELLS] = segment * CELLS + np.arange(CELLS)
            fields["guide_mask"][row, begin + CELLS] = True
            fields["loss_mask"][row, begin + CELLS + 1 : end] = True
            begin = end
    return Batch(**fields)


class NoiseIterator:
    """An endless, checkpointable stream of noise batches; `shard` of `shards` equal parts of each global batch."""

    def __init__(self, rows: int = 8, shard: int = 0, shards: int = 1, first_seed: int = 100):
        self.rows, self.shard, self.shards = rows, shard, shards
        self.next_seed = first_seed

    def __iter__(self):
        return self

    def __next__(self) -> HostBatch:
        seed = self.next_seed
        self.next_seed += 1
        whole = noise_batch(seed, self.rows)
        mine = slice(
            self.shard * self.rows // self.shards,
            (self.shard + 1) * self.rows // self.shards,
        )
        fields = {name: value[mine] for name, value in vars(whole).items() if value is not None}
        ids = tuple((f"{seed}/{row}/1", f"{seed}/{row}/2") for row in range(self.rows)[mine])
        return HostBatch(batch=Batch(**fields), record_ids=ids)

    def get_state(self) -> dict:
        return {"next_seed": self.next_seed}

    def set_state(self, state: dict) -> None:
        self.next_seed = state["next_seed"]
