"""The paper's tables as a declaration, which config files, evaluation and benchmarks read."""

from vr_jax.experiments.systems import BASELINE, DECODERS, IMAGES, VISION_REMEMBER, Fields, System
from vr_jax.experiments.tables import TABLES, Table, find_row, listing

__all__ = [
    "BASELINE",
    "DECODERS",
    "IMAGES",
    "TABLES",
    "VISION_REMEMBER",
    "Fields",
    "System",
    "Table",
    "find_row",
    "listing",
]
