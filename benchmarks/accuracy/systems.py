"""The systems that are trained: the rows of `vr_jax.experiments.TABLES` at this benchmark's sizes, each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.training import size_of
from vr_jax.errors import ConfigError
from vr_jax.experiments import TABLES, Fields, System
from vr_jax.model.config import VlmConfig


@dataclass(frozen=True)
class Entry:
    """name: table/row where it appears first. A pruned system is the uncompressed model, pruned: nothing is trained."""

    name: str
    config: VlmConfig

    @property
    def is_trained(self) -> bool:
        return self.config.projector.name != "mlp"


@dataclass(frozen=True)
class Systems:
    entries: dict[str, Entry]
    rows: dict[tuple[str, str], str]  # (table, row) -> name of its system
    refused: dict[tuple[str, str], str]  # rows that cannot exist at this size, and why


def systems(setting: Setting) -> Systems:
    by_config: dict[VlmConfig, Entry] = {}
    rows, refused = {}, {}
    for table, row, system in all_rows():
        try:
            config = _at_depth(system, setting).at(size_of(setting), setting.levels, method_sizes(setting))
        except ConfigError as error:
            refused[table, row] = str(error)
            continue
        entry = by_config.setdefault(config, Entry(f"{table}/{row}", config))
        rows[table, row] = entry.name
    return Systems({entry.name: entry for entry in by_config.values()}, rows, refused)


def all_rows() -> Iterator[tuple[str, str, System]]:
    for name, table in TABLES.items():
        for row, system in table.rows.items():
            yield name, row, system


def _at_depth(system: System, setting: Setting) -> System:
    """The row with its insertions at about the paper's relative depth."""
    refusion = system.refusion
    if setting.insertions is None or refusion is None:
        return system
    if "insert_after" in refusion:
        after = tuple(setting.insertions[layer] for layer in refusion["insert_after"])
        return replace(system, refusion={**refusion, "insert_after": after})
    return replace(system, insert_every=1) if system.insert_every else system


def method_sizes(setting: Setting) -> dict[str, Fields]:
    """Widths of the methods relative to the encoder's as in the paper's setting (1024 channels), heads as many as a
    narrow model can afford: one head per 128 channels would be a single head here."""
    width, heads, patches = setting.vision.hidden_size, setting.vision.num_heads, setting.page.grid**2
    sizes: dict[str, Fields] = {
        "vision_remember": {"cross_heads": setting.cross_heads},
        "perceiver": {"heads": heads, "head_dim": width // (2 * heads)},
        "token_packer": {"heads": heads},
        "sva": {"width": width, "heads": heads},
        "vispruner": {"tokens": patches // 9},
    }
    if setting.text.num_layers < 18:
        # One layer with all tokens is more than a ninth already. The fractions of 24 layers, at the layers that
        # correspond to 2, 6 and 12.
        layers = tuple(
            max(k + 1, round(setting.text.num_layers * part)) for k, part in enumerate((1 / 12, 1 / 4, 1 / 2))
        )
        sizes["pyramid_drop"] = {"layers": layers, "ratios": (0.133, 0.0177, 0.0024)}
    return sizes
