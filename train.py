"""Trains a recipe: python train.py --config=configs/llava_vr_qwen2_0_5b.py:phase1 --workdir=runs/phase1

Any field can be set (--config.optimizer.lr=1e-4); the same command continues a run that was stopped (docs/train.md)."""

import os

from absl import app, flags
from ml_collections import config_flags

from vr_jax.cli import train as cli

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/llava_vr_qwen2_0_5b.py:phase1")
flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the final model directory go.")
flags.DEFINE_bool("export_only", False, "Only write <workdir>/model from the newest checkpoint.")
flags.DEFINE_bool("distributed", False, "Several processes that JAX finds by itself (TPU pods, Slurm, Open MPI).")
flags.DEFINE_string("coordinator", os.environ.get("JAX_COORDINATOR_ADDRESS"), "Several processes: host:port of no. 0.")
flags.DEFINE_integer("num_processes", os.environ.get("JAX_NUM_PROCESSES"), "With --coordinator: how many.")  # type: ignore[arg-type]
flags.DEFINE_integer("process_id", os.environ.get("JAX_PROCESS_ID"), "With --coordinator: this one, from 0.")  # type: ignore[arg-type]


def main(argv: list[str]) -> None:
    cli.main(flags.FLAGS, CONFIG.value, argv[1:])


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
