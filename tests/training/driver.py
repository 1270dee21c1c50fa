"""A run in a process of its own, to be killed: python -m tests.training.driver WORKDIR [--delay S] [--set FIELD=VALUE]
[--held_out FILE]

Same loop, checkpoints and exit codes as `vr-jax train`, on noise."""

import argparse
import json
import sys
from pathlib import Path

from tests.training.held_out import inputs_with_processor, validated_run
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
    parser.add_argument("--held_out")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args()
    if options.coordinator:
        distributed.initialize(options.coordinator, options.processes, options.process)
    changes = dict(item.split("=", 1) for item in options.set)
    values = {name: json.loads(value) for name, value in changes.items()}
    config = validated_run(options.held_out, **values) if options.held_out else tiny_run(**values)
    start_logging("vr-jax train", verbose=True)
    inputs = inputs_with_processor if options.held_out else noise_inputs(options.delay)
    sys.exit(guarded(["vr-jax train"], lambda: train(config, options.workdir, open_inputs=inputs)))
