"""Rows of packed samples, and the timed training step of a small model on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import side_by_side
from vr_jax import experiments, sharding
from vr_jax.data.collate import collate
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.types import Example
from vr_jax.model.batch import NO_CELL, Batch, BatchShape
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model_directory import warm_start
from vr_jax.settings import TrainConfig
from vr_jax.training import TrainState, build_program, create_state, put_batch, step_flops

Sizes = Sequence[tuple[int, int]]  # The numbers of tokens and of tiles of each sample.


def packed(sizes: Sizes, shape: BatchShape, lookahead: int | None = None) -> list[list[list[int]]]:
    """Packs samples as the training pipeline does.

    Args:
        sizes: The sizes of the samples.
        shape: The shape of a batch.
        lookahead: The number of samples among which the packer chooses; default: that of training.

    Returns:
        The indices of the samples in each row of each complete batch.
    """
    packer = RowPacker(shape, lookahead=lookahead or 16 + 2 * shape.rows)
    batches = []
    for index, (tokens, tiles) in enumerate(sizes):
        packer.offer(IndexedExample((0, index), _example(index, tokens, tiles)))
        if packer.complete:
            batches.append([[int(example.id) for example in row] for row in packer.take()])
    return batches


def _example(index: int, tokens: int, tiles: int, side: int = 0) -> Example:
    """Makes an example of a given size that holds nothing, with tiles of side x side pixels."""
    nothing = np.zeros(tokens, bool)
    return Example(
        id=str(index),
        tokens=np.ones(tokens, np.int32),
        loss_mask=nothing,
        text_token_mask=nothing,
        vision_cell=np.full(tokens, NO_CELL, np.int32),
        tile_pixels=np.zeros((tiles, side, side, 3), np.uint8),
        tile_image=np.ones(tiles, np.int32),
        cells_per_tile=1,
    )


def small_config() -> TrainConfig:
    """The configuration of phase 2 at 1/9 with a small encoder and a small decoder.

    A tile has 24 x 24 patches. The ratio of the encoder's FLOPs per tile to the decoder's per token is about that of
    SigLIP-L and Qwen2-0.5B, which is 511.
    """
    model = VlmConfig(
        encoder=SiglipConfig(
            hidden_size=192, intermediate_size=768, num_layers=3, num_heads=3, image_size=48, patch_size=2
        ),
        decoder=TransformerConfig(
            vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=2, num_heads=4, num_kv_heads=2
        ),
        projector=PoolConfig(stride=3),
        refusion=VisionRememberConfig(insert_after=(1,), levels=(1, 2, 3), cross_heads=3),
        vision_feature_layer=3,
        image=experiments.IMAGES["anyres9"](48),
    )
    return TrainConfig(model=model, trainable=("decoder.*", "refusion.*", "projector.*", "image_newline"))


def measured_step(sizes: Sizes, tokens: int, tiles: int, rounds: int) -> str:
    """Times a training step of `small_config` with the samples of one packed row.

    It is compared with a step in which each of these samples has a row of its own.

    Args:
        sizes: The sizes of the samples to pack.
        tokens: Token slots of a row.
        tiles: Tile slots of the packed row.
        rounds: Timed steps of each.

    Returns:
        The times as text, with the ratio that the FLOPs of the slots give in brackets.
    """
    config = small_config()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = build_program(config, mesh, 100)
    side = program.model.image.tile_size
    shape = BatchShape(rows=1, tokens=tokens, tiles=tiles, tile_size=side)
    (row,) = packed(sizes, shape)[0]
    most = max(tiles for _, tiles in sizes)
    alternatives = {
        "packed": (shape, [row]),
        "one sample per row": (
            BatchShape(rows=len(row), tokens=tokens, tiles=most, tile_size=side),
            [[k] for k in row],
        ),
    }
    step = step_flops(program.model, program.trainable)
    calls, flops = {}, {}
    with jax.set_mesh(mesh):
        model, _ = warm_start([], program.model, mesh)
        start = create_state(program.tree, program.optimizer, program.abstract, model)
        for name, (shape, rows) in alternatives.items():
            host = collate([[_example(k, *sizes[k], side) for k in numbers] for numbers in rows], shape)
            batch = put_batch(host.batch, mesh)
            calls[name] = _Repeated(program.step.lower(start, batch).compile(), jax.tree.map(jnp.copy, start), batch)
            slots = {"tokens": shape.rows * shape.tokens, "tiles": shape.rows * shape.tiles}
            # XLA on a CPU multiplies the whole square of queries and keys, of which the mask leaves half.
            flops[name] = step.total(**slots, pairs=shape.rows * shape.tokens**2, targets=0)
        timings = side_by_side(calls, rounds=rounds, warmup=1)
    ratios = {name: timing.median / timings["packed"].median for name, timing in timings.items()}
    lines = [f"train step of a small model, {len(row)} samples (in brackets: by the FLOPs of its slots)"]
    lines += [
        f"  {name:<20} {timing}   x {ratios[name]:.2f} of packed (x {flops[name] / flops['packed']:.2f})"
        for name, timing in timings.items()
    ]
    return "\n".join(lines)


class _Repeated:
    """Calls a training step repeatedly, each time on the state that it returned, because a step donates its state."""

    def __init__(self, step: Callable, state: TrainState, batch: Batch):
        self._step, self._state, self._batch = step, state, batch

    def __call__(self) -> object:
        self._state, metrics = self._step(self._state, self._batch)
        return metrics
