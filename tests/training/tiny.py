"""A LLaVA-VR of a few thousand parameters, and batches of noise with its shapes."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from vr_jax.data.types import HostBatch
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.settings import TrainConfig
from vr_jax.training.inputs import Inputs
from vr_jax.training.trackers import read_metrics

TILE, CELLS, VOCABULARY = 16, 4, 64
STEPS = 20


# Every width is a multiple of 8, so that each mesh of 8 devices divides it.
ENCODER = SiglipConfig(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, image_size=TILE, patch_size=4)
DECODER = TransformerConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2
)


def tiny_config(**changes) -> VlmConfig:
    """A model of two layers each, with a Vision Remember block after the first."""
    fields = {
        "encoder": ENCODER,
        "decoder": DECODER,
        "projector": PoolConfig(stride=2),
        "refusion": VisionRememberConfig(insert_after=(1,), levels=(1, 2), init="torch_default"),
        "image": single_tile(TILE),
        "vision_feature_layer": 2,
    }
    return VlmConfig(**{**fields, **changes})


# A model without re-fusion block that compiles fast, for tests of what does not depend on the model.
PLAIN = tiny_config(
    encoder=dataclasses.replace(ENCODER, num_layers=1),
    decoder=dataclasses.replace(DECODER, num_layers=1),
    vision_feature_layer=1,
    refusion=None,
)


def noise_batch(seed: int, rows: int = 8, tokens: int = 24) -> Batch:
    """Each row: two samples of an image and some text, and padding; numbers of targets differ among rows."""
    rng = np.random.default_rng(seed)
    fields = {
        "tokens": rng.integers(1, VOCABULARY, (rows, tokens)).astype(np.int32),
        "positions": np.zeros((rows, tokens), np.int32),
        "segment_ids": np.zeros((rows, tokens), np.int32),
        "loss_mask": np.zeros((rows, tokens), bool),
        "text_token_mask": np.zeros((rows, tokens), bool),
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
            fields["text_token_mask"][row, begin + CELLS] = True
            fields["loss_mask"][row, begin + CELLS + 1 : end] = True
            begin = end
    return Batch(**fields)


class NoiseIterator:
    """An endless, checkpointable stream of noise batches: part `shard` of `shards` of each global batch.

    delay: seconds that a batch takes."""

    def __init__(self, rows: int = 8, shard: int = 0, shards: int = 1, delay: float = 0.0):
        self.rows, self.shard, self.shards, self.delay = rows, shard, shards, delay
        self.number = 0

    def __next__(self) -> HostBatch:
        time.sleep(self.delay)
        self.number += 1
        whole = noise_batch(self.number, self.rows)
        size = self.rows // self.shards
        mine = slice(self.shard * size, (self.shard + 1) * size)
        ids = tuple((f"{self.number}/{row}/1", f"{self.number}/{row}/2") for row in range(self.rows))
        return HostBatch(batch=jax.tree.map(lambda x: x[mine], whole), record_ids=ids[mine])

    def get_state(self) -> dict:
        return {"number": self.number}

    def set_state(self, states: list[dict]) -> None:
        (self.number,) = {state["number"] for state in states}

    def close(self) -> None:
        pass


def noise_inputs(delay: float = 0.0):
    """Stands in for `vr_jax.training.inputs.open_inputs`."""

    def open_inputs(config, mesh, workdir):
        iterator = NoiseIterator(config.batch.rows, jax.process_index(), jax.process_count(), delay)
        return Inputs(iterator, samples=1000, tokenizer_dir=None)

    return open_inputs


def tiny_run(**changes) -> TrainConfig:
    """20 updates of everything but the encoder, saved every 4. changes: values by dotted field name."""
    fields = {
        "batch.rows": 8,
        "batch.tokens": 24,
        "batch.tiles": 2,
        "trainable": ("decoder.*", "refusion.*", "projector.*"),
        "optimizer.lr": 3e-3,
        "loss_chunk": 8,
        "steps": 20,
        "checkpoint.every": 4,
        "tensorboard": False,
    }
    return TrainConfig(model=tiny_config()).replace(fields | changes)


def plain_run(**changes) -> TrainConfig:
    """4 updates of `PLAIN`, saved every 2. changes: values by dotted field name."""
    fields = {"model": PLAIN, "trainable": ("decoder.*", "projector.*"), "steps": 4, "checkpoint.every": 2}
    return tiny_run(**fields).replace(changes)


def twenty_steps(**changes):
    """20 updates of `PLAIN`, saved every 4."""
    return plain_run(**{"steps": STEPS, "checkpoint.every": 4} | changes)


def series(workdir):
    """Step, loss, norm of the gradient and learning rate of every update that a run has written."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(workdir / "metrics.jsonl")]
