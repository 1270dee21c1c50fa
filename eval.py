"""Scores a checkpoint: python eval.py --checkpoint=DIR --benchmark=chartqa --data=DIR (docs/evaluate.md)."""

import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from vr_jax.cli import train as cli
from vr_jax.evaluation import main as evaluation
from vr_jax.evaluation.types import PROFILES

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe; its model, mesh and eval sections are used.")
OPTIONS = (
    flags.DEFINE_string("checkpoint", None, "Model directory (what training exports and convert writes)."),
    flags.DEFINE_string("benchmark", None, "Names, separated by commas (chartqa,docvqa), or all: the paper's eleven."),
    flags.DEFINE_string(
        "data",
        None,
        "Folder with the published parquet files (or JSONL); of several benchmarks, a folder each. Default: the hub.",
    ),
    flags.DEFINE_string("output", None, "Where results go, in a folder per benchmark (default: <checkpoint>/eval)."),
    flags.DEFINE_string("split", None, "Split of the data (default: the published one)."),
    flags.DEFINE_enum("profile", None, PROFILES, "Scoring rules: those of lmms-eval 0.7.3 (default) or 0.5.0."),
    flags.DEFINE_integer("limit", None, "Only the first items."),
    flags.DEFINE_integer("batch_size", None, "Items per batch, over all devices (default: 16)."),
    flags.DEFINE_integer("max_new_tokens", None, "Longest reply (default: the benchmark's)."),
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and activations (default: as saved)."),
    flags.DEFINE_string(
        "pruning", None, "Pruner of vision tokens: fastv, pyramid_drop, vispruner; or JSON with fields."
    ),
    flags.DEFINE_integer("report_items", None, "Items that report.html shows (default: 500); 0: no report."),
    flags.DEFINE_bool("overwrite", None, "Throw away an earlier run in the output folder."),
)
flags.DEFINE_bool("distributed", False, "Several processes that JAX finds by itself (TPU pods, Slurm, Open MPI).")
flags.DEFINE_string("coordinator", os.environ.get("JAX_COORDINATOR_ADDRESS"), "Several processes: host:port of no. 0.")
flags.DEFINE_integer("num_processes", os.environ.get("JAX_NUM_PROCESSES"), "With --coordinator: how many.")  # type: ignore[arg-type]
flags.DEFINE_integer("process_id", os.environ.get("JAX_PROCESS_ID"), "With --coordinator: this one, from 0.")  # type: ignore[arg-type]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        cli.fail(2, f"unexpected argument {argv[1]!r}")
    values = flags.FLAGS
    if values.coordinator:
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    elif values.distributed:
        jax.distributed.initialize()
    sys.exit(evaluation.main({option.name: option.value for option in OPTIONS}, CONFIG.value))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
