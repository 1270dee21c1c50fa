"""Any row of the paper's Tables 1-5: --config=configs/tables/paper.py:TABLE/ROW/SIZE/PHASE.

An example is `table1/perceiver_vr/1.5b/phase2`. SIZE (0.5b, 1.5b, 7b) and PHASE (phase1, phase2) may be left out and
are then 0.5b and phase1. `vr-jax experiments` lists all rows; `vr_jax/experiments/tables.py` declares them.

A row has the settings of its size and phase, `configs/llava_vr_qwen2_SIZE.py:PHASE`, and differs in the method only: in
the projector, the re-fusion block, in Table 5 the image grids, and in the shapes that follow from the number of vision
tokens of a tile. A training-free row trains the uncompressed model; `eval.pruning` holds the pruner that evaluation
switches on.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vr_jax.experiments import DECODERS, IMAGES, TABLES, find_row
from vr_jax.model.config import VlmConfig
from vr_jax.settings import read_config_file

PHASES = ("phase1", "phase2")


def phase1_batch(cells: int) -> dict[str, Any]:
    """Returns the shapes of phase 1 for a number of vision tokens per tile."""
    # Rows of four captions with one tile each. A caption and its separators have 15 tokens on average
    # (benchmarks/input/packing.py); packing puts long captions beside short ones.
    return {"rows": 256 // 4, "tokens": 4 * (cells + 17), "tiles": 4, "accumulation": 1, "raise_rows": "refuse"}


def phase2_batch(cells: int) -> dict[str, Any]:
    """Returns the shapes of phase 2 for a number of vision tokens per tile."""
    # A sample of the 779K has 4.85 tiles on average, and for each tile 87 % of its vision tokens and 53 tokens of text
    # (benchmarks/input/packing.py). Rows hold four samples, in blocks of the attention kernels, and at least the
    # longest text. A tenth more tiles than the tokens bring makes a row full in tokens before it is full in tiles.
    tokens_per_tile = 0.87 * cells + 53
    tokens = max(2048, 512 * round(4 * 4.85 * tokens_per_tile / 512))
    tiles = math.ceil(1.1 * tokens / tokens_per_tile)
    return {"rows": 32 // 4, "tokens": tokens, "tiles": tiles, "accumulation": 1, "raise_rows": "refuse"}


def get_config(variant: str = "table2/ratio9_vr") -> ConfigDict:
    """Returns the settings of a row."""
    parts = variant.split("/")
    if not 2 <= len(parts) <= 4:
        raise ValueError(f"{variant!r}: expected table/row/size/phase, e.g. table1/pooling_vr/1.5b/phase2")
    table, name, size, phase = (*parts, *("0.5b", "phase1")[len(parts) - 2 :])
    row = find_row(table, name)
    for kind, value, known in (("size", size, DECODERS), ("phase", phase, PHASES)):
        if value not in known:
            raise ValueError(f"{variant}: no {kind} {value!r}: expected one of {', '.join(known)}")

    file = Path(__file__).parents[1] / f"llava_vr_qwen2_{size.replace('.', '_')}.py"
    config = read_config_file(f"{file}:{phase}").to_dict()
    model = VlmConfig.from_dict({**config["model"], "refusion": None})
    if phase == "phase2":
        model = dataclasses.replace(model, image=IMAGES[TABLES[table].image]())
    model = dataclasses.replace(row, pruning=None).at(model)
    config["model"] = model.to_dict()
    config["batch"] = {"phase1": phase1_batch, "phase2": phase2_batch}[phase](model.cells_per_tile)
    if phase == "phase2" and model.cells_per_tile < 64:
        config["samples_per_step"] = 39  # at 1/16, more than four samples fit into the longest text
    if model.refusion is None:
        config["trainable"] = tuple(glob for glob in config["trainable"] if glob != "refusion.*")
    if row.pruning is not None:
        config["eval"] = {"pruning": dict(row.pruning)}
    return ConfigDict(config)
