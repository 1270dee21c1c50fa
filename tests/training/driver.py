"""A run in a process of its own, to be killed: python -m tests.training.driver WORKDIR [--delay S] [--set FIELD=VALUE]
[--held_out FILE]

Same loop, checkpoints and exit codes as `vr-jax train`, on noise, or with --texts on the two sources of a folder."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from tests.data.samples import small_config
from tests.training.held_out import inputs_with_processor, validated_run
from tests.training.tiny import noise_inputs, plain_run, tiny_run
from vr_jax import distributed
from vr_jax.cli.logs import start_logging
from vr_jax.cli.main import guarded
from vr_jax.processes.liveness import HEARTBEAT_TIMEOUT
from vr_jax.settings import SourceSettings
from vr_jax.storage import as_path
from vr_jax.training.inputs import open_inputs as open_real_inputs
from vr_jax.training.loop import train


def texts_run(folder, changes):
    """A run on the texts a.json and b.json of a folder, in equal parts and without shuffling."""
    fields = {
        "model": small_config(text_pool=None),
        "tokenizer": "demo",
        "data.sources": tuple(SourceSettings(path=str(folder / f"{name}.json"), weight=1.0) for name in "ab"),
        "data.label_quirk": False,
        "data.shuffle": False,
        "data.workers": 0,
        "batch.rows": 6,
        "batch.tokens": 80,
        "batch.tiles": 9,
        "trainable": ("decoder.*",),
        "checkpoint.every": 100,
    }
    return plain_run().replace(fields).replace(changes)


def recording(path):
    """The real inputs, with the names of the samples of each batch written to a file at the end."""

    def open_inputs(config, mesh, workdir):
        found = open_real_inputs(config, mesh, workdir)
        return dataclasses.replace(found, iterator=Recording(found.iterator, path))

    return open_inputs


class Recording:
    """An iterator that keeps the names of the samples that it gives."""

    def __init__(self, iterator, path):
        self.iterator, self.path, self.names = iterator, path, []

    def __next__(self):
        batch = next(self.iterator)
        self.names.append([name for row in batch.record_ids for name in row])
        self.path.write_text(json.dumps(self.names))
        return batch

    def get_state(self):
        return self.iterator.get_state()

    def set_state(self, states):
        self.iterator.set_state(states)

    def close(self):
        self.iterator.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=as_path)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--held_out")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--texts", type=Path)
    options = parser.parse_args()
    if options.coordinator:
        timeout = float(os.environ.get("VR_JAX_HEARTBEAT_TIMEOUT", HEARTBEAT_TIMEOUT))
        distributed.initialize(options.coordinator, options.processes, options.process, heartbeat_timeout=timeout)
    changes = dict(item.split("=", 1) for item in options.set)
    values = {name: json.loads(value) for name, value in changes.items()}
    config = validated_run(options.held_out, **values) if options.held_out else tiny_run(**values)
    start_logging("vr-jax train", verbose=True)
    inputs = inputs_with_processor if options.held_out else noise_inputs(options.delay)
    if options.texts:
        config = texts_run(options.texts, values)
        read = options.texts / f"read_{options.processes or 1}_{options.process}.json"
        inputs = recording(read)
    sys.exit(guarded(["vr-jax train"], lambda: train(config, options.workdir, open_inputs=inputs)))
