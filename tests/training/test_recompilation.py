"""After the first updates the loop compiles nothing more, and a step moves nothing between host and devices."""

import jax
import numpy as np
import pytest

from tests.compilations import compilations
from tests.training.tiny import CELLS, TILE, VOCABULARY, noise_batch, plain_run
from vr_jax.data.collate import collate
from vr_jax.data.packing import IndexedExample, RowPacker
from vr_jax.data.types import Example
from vr_jax.model.batch import BatchShape
from vr_jax.training import loop, program
from vr_jax.training.inputs import Inputs

WARM_UP = 2


class PackedNoise:
    """Samples of many lengths, with an image and without, packed and collated as the pipeline does it. Notes what was
    compiled by the time that each batch was asked for."""

    def __init__(self, config, compiled):
        batch = config.batch
        self.shape = BatchShape(rows=batch.rows, tokens=batch.tokens, tiles=batch.tiles, tile_size=TILE)
        self.packer = RowPacker(self.shape, lookahead=8)
        self.rng = np.random.default_rng(0)
        self.compiled, self.marks, self.batches, self.number = compiled, [], [], 0

    def __next__(self):
        self.marks.append(len(self.compiled))
        while not self.packer.complete:
            self.packer.offer(IndexedExample(self.number, self.example()))
            self.number += 1
        self.batches.append(collate(self.packer.take(), self.shape))
        return self.batches[-1]

    def example(self) -> Example:
        cells = np.arange(CELLS) if self.rng.random() < 0.8 else np.arange(0)
        text = int(self.rng.integers(3, 12))
        return Example(
            id=str(self.number),
            tokens=self.rng.integers(1, VOCABULARY, len(cells) + text).astype(np.int32),
            loss_mask=np.arange(len(cells) + text) > len(cells) + 1,
            text_token_mask=np.arange(len(cells) + text) == len(cells),
            vision_cell=np.append(cells, np.full(text, -1)).astype(np.int32),
            tile_pixels=self.rng.integers(0, 256, (len(cells) // CELLS, TILE, TILE, 3)).astype(np.uint8),
            tile_image=np.ones(len(cells) // CELLS, np.int32),
            cells_per_tile=CELLS,
        )

    def get_state(self):
        return {"number": self.number}

    def close(self):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run with checkpoints in between, its steps under guard, and what it compiled."""
    config = plain_run(**{"steps": 12, "checkpoint.every": 4})
    found = []

    def open_inputs(*_):
        found.append(PackedNoise(config, compiled))
        return Inputs(found[0], samples=1000, tokenizer_dir=None)

    make_train_step = program.make_train_step

    def guarded(*arguments, **options):
        step = make_train_step(*arguments, **options)

        def call(state, batch):
            with jax.transfer_guard("disallow"):
                return step(state, batch)

        return call

    with pytest.MonkeyPatch.context() as patch, compilations() as compiled:
        patch.setattr(program, "make_train_step", guarded)
        loop.train(config, tmp_path_factory.mktemp("run"), open_inputs=open_inputs)
    return config, compiled, found[0]


def test_nothing_is_compiled_after_the_first_updates(run):
    config, compiled, iterator = run
    assert len(iterator.marks) == config.steps > 2 * config.checkpoint.every
    warm, last = iterator.marks[WARM_UP], iterator.marks[-1]
    assert compiled[:warm].count("jit(step)") == 1
    # What a step needs is there after the warm-up, what a checkpoint needs (slices) after the first one.
    save, saved = iterator.marks[config.checkpoint.every - 1], iterator.marks[config.checkpoint.every]
    assert compiled[warm:save] == []
    assert set(compiled[save:saved]) <= {"jit(slice)", "jit(dynamic_slice)"}
    assert compiled[saved:last] == []


def test_the_batches_differed(run):
    """In how many samples, tokens and tiles they hold, which could make programs of other shapes."""
    _, _, iterator = run
    used = [
        (int(batch.segment_ids.max()), int((batch.segment_ids > 0).sum()), int((batch.tile_segment > 0).sum()))
        for batch in (one.batch for one in iterator.batches)
    ]
    assert len(set(used)) > len(used) // 2


def test_guard_and_count_see_what_they_are_for():
    step = jax.jit(lambda batch: batch.tokens.sum())
    batch = noise_batch(0)
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
        step(batch)
    with compilations() as compiled:
        for rows in (8, 8, 4):
            step(noise_batch(0, rows))
    assert len(compiled) == 1, "the first was traced under the guard"
