"""The systems that the comparison trains: the rows of `vr_jax.experiments.TABLES` at this benchmark's sizes.

A system that occurs in several tables is trained once.
"""

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
    """One system.

    A pruned system is the uncompressed model with a pruner, so nothing of it is trained.

    Attributes:
        name: Its first row, as table/row.
        config: Its model.
    """

    name: str
    config: VlmConfig

    @property
    def is_trained(self) -> bool:
        """Whether the system is trained, which the uncompressed model and the pruned ones are not."""
        return self.config.projector.name != "mlp"


@dataclass(frozen=True)
class Systems:
    """All systems of a setting.

    Attributes:
        entries: The systems by name.
        rows: The name of the system of every (table, row).
        refused: The reason for every (table, row) that cannot exist at this size.
    """

    entries: dict[str, Entry]
    rows: dict[tuple[str, str], str]
    refused: dict[tuple[str, str], str]


def systems(setting: Setting) -> Systems:
    """The systems of the paper's tables at the sizes of a setting."""
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
    """The table, the name and the system of every row of the paper's tables."""
    for name, table in TABLES.items():
        for row, system in table.rows.items():
            yield name, row, system


def _at_depth(system: System, setting: Setting) -> System:
    """The system with its re-fusion blocks at about the paper's relative depth."""
    refusion = system.refusion
    if setting.insertions is None or refusion is None:
        return system
    if "insert_after" in refusion:
        after = tuple(setting.insertions[layer] for layer in refusion["insert_after"])
        return replace(system, refusion={**refusion, "insert_after": after})
    return replace(system, insert_every=1) if system.insert_every else system


def method_sizes(setting: Setting) -> dict[str, Fields]:
    """Fields of the methods that depend on the width of the model, by the method's name.

    Widths have the same ratio to the encoder's as in the paper, whose encoder has 1024 channels. The numbers of heads
    are larger than the paper's ratio, because one head per 128 channels would be a single head here.
    """
    width, heads, patches = setting.vision.hidden_size, setting.vision.num_heads, setting.page.grid**2
    sizes: dict[str, Fields] = {
        "vision_remember": {"cross_heads": setting.cross_heads},
        "perceiver": {"heads": heads, "head_dim": width // (2 * heads)},
        "token_packer": {"heads": heads},
        "sva": {"width": width, "heads": heads},
        "vispruner": {"tokens": patches // 9},
    }
    if setting.text.num_layers < 18:
        # One layer with all tokens is more than a ninth of the work already. So the pruner drops tokens at the layers
        # that correspond to 2, 6 and 12 of 24, with smaller ratios.
        layers = tuple(
            max(k + 1, round(setting.text.num_layers * part)) for k, part in enumerate((1 / 12, 1 / 4, 1 / 2))
        )
        sizes["pyramid_drop"] = {"layers": layers, "ratios": (0.133, 0.0177, 0.0024)}
    return sizes
