"""Scores a checkpoint: python eval.py --checkpoint=DIR --benchmark=chartqa --data=DIR (docs/evaluate.md)."""

import sys

from absl import app, flags
from ml_collections import config_flags

from vr_jax.evaluation import main as evaluation
from vr_jax.evaluation.types import PROFILES

flags.DEFINE_string("checkpoint", None, "Model directory (what training exports and convert writes).")
flags.DEFINE_string("benchmark", None, "Name of the benchmark, e.g. chartqa.")
flags.DEFINE_string("data", None, "Folder (or file) with the benchmark's JSONL or published parquet files.")
flags.DEFINE_string("output", None, "Where results go, in a folder per benchmark (default: <checkpoint>/eval).")
flags.DEFINE_string("split", None, "Split of the data (default: test).")
flags.DEFINE_enum("profile", None, PROFILES, "Scoring rules: those of lmms-eval 0.7.3 (default) or 0.5.0.")
flags.DEFINE_integer("limit", None, "Only the first items.")
flags.DEFINE_integer("batch_size", None, "Items per batch, over all devices (default: 16).")
flags.DEFINE_integer("max_new_tokens", None, "Longest reply (default: the benchmark's).")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of parameters and activations (default: the checkpoint's).")
flags.DEFINE_boolean("overwrite", None, "Throw away an earlier run in the output folder.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe whose `eval` and `mesh` sections give defaults.")
OPTIONS = (
    "checkpoint", "benchmark", "data", "output", "split", "profile", "limit", "batch_size", "max_new_tokens", "dtype",
    "overwrite",
)  # fmt: skip


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    sys.exit(evaluation.main(given, CONFIG.value))


if __name__ == "__main__":
    app.run(main)
