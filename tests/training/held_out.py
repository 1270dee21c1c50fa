"""A tiny run on noise that measures held-out samples of the generated data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tests.training.tiny import PLAIN, noise_inputs, plain_run
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.settings import TrainConfig

VOCABULARY = 304  # that of the demo's tokenizer, and a multiple of 8


def validated_run(path, **changes) -> TrainConfig:
    """Updates on noise, and the mean loss over the samples of a file every other one."""
    decoder = dataclasses.replace(PLAIN.decoder, vocab_size=VOCABULARY)
    model = dataclasses.replace(PLAIN, decoder=decoder, dtype="float32")  # as exact as the reference
    one = {"source": {"path": str(path), "images": str(Path(path).parent / "images")}, "every": 2}
    fields = {
        "model": model,
        "frozen_dtype": "float32",
        "batch.tokens": 160,
        "batch.tiles": 2,
        "validation": {"held_out": one},
    }
    return plain_run(**fields | changes)


def inputs_with_processor(config, mesh, workdir):
    """Noise to train on, and what prepares the held-out samples."""
    processor = Processor(demo_tokenizer(), config.model)
    return dataclasses.replace(noise_inputs()(config, mesh, workdir), processor=processor)
