"""A run in a process of its own, to be killed: python -m tests.training.driver WORKDIR [--delay S] [--set FIELD=VALUE]

Same loop, checkpoints and exit codes as `vr-jax train`, on noise."""

import argparse
import json
import sys
from pathlib import Path

from tests.training.tiny import noise_inputs, tiny_run
from vr_jax import distributed
from vr_jax.cli.logs import start_logging
from vr_jax.cli.main import guarded
from vr_jax.training.loop import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args()
    if options.coordinator:
        distributed.initialize(options.coordinator, options.processes, options.process)
    changes = dict(item.split("=", 1) for item in options.set)
    config = tiny_run(**{name: json.loads(value) for name, value in changes.items()})
    start_logging("vr-jax train", verbose=True)
    inputs = noise_inputs(options.delay)
    sys.exit(guarded(["vr-jax train"], lambda: train(config, options.workdir, open_inputs=inputs)))
