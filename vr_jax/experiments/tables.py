"""The paper's Tables 1-5, row by row.

The config file `configs/tables/paper.py`, the comparison with the paper's scores and the benchmark in miniature
(`benchmarks/accuracy/`) are made from this declaration. What the paper leaves open is chosen in
docs/design/methods.md#ambiguities. Rows that the paper does not have are marked `extra`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vr_jax.errors import ConfigError
from vr_jax.experiments.systems import BASELINE, UNCOMPRESSED, VISION_REMEMBER, Fields, System, pool, remember

_PROJECTORS = {"pooling": "pool", "pixel_shuffle": "pixel_shuffle", "perceiver": "perceiver", "ldpv2": "ldpv2"}
_TITLES = {"pooling": "Pooling", "pixel_shuffle": "PixelShuffle", "perceiver": "Perceiver", "ldpv2": "LDPv2"}


def _with_and_without(name: str, title: str, projector: Fields) -> dict[str, System]:
    """Returns a projector alone and with Vision Remember ("V.R."), as the paper's tables pair them."""
    return {
        name: System(title=title, projector=projector),
        f"{name}_vr": System(title=f"{title} + V.R.", projector=projector, refusion=remember()),
    }


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: What the table compares.
        image: The image layout of its models, a key of `IMAGES`.
        rows: The models by the name that config files give them.
    """

    title: str
    image: str
    rows: Mapping[str, System]


TABLES: dict[str, Table] = {
    "table1": Table(
        "Vision Remember with various projectors, 1/9",
        "anyres9",
        {
            row: system
            for name, projector in _PROJECTORS.items()
            for row, system in _with_and_without(name, _TITLES[name], {"name": projector, "stride": 3}).items()
        },
    ),
    "table2": Table(
        "Compression ratios, pooling",
        "anyres9",
        {
            row: system
            for stride in (2, 3, 4)
            for row, system in _with_and_without(f"ratio{stride**2}", f"1/{stride**2}", pool(stride)).items()
        },
    ),
    "table3": Table(
        "Re-fusion methods, pooling 1/9",
        "anyres9",
        {
            "baseline": BASELINE,
            "sva": System(title="SVA", projector=pool(), refusion={"name": "sva", "insert_after": (1, 4)}),
            "sva_every_third": System(
                title="SVA, every third layer",
                projector=pool(),
                refusion={"name": "sva"},
                insert_every=3,
                extra=True,
            ),
            "deepstack": System(title="DeepStack", projector=pool(), refusion={"name": "deepstack"}),
            "deepstack_qwen3_vl": System(
                title="DeepStack, Qwen3-VL merger",
                projector=pool(),
                refusion={"name": "deepstack", "merger": "qwen3_vl"},
                extra=True,
            ),
            "vision_remember": VISION_REMEMBER,
        },
    ),
    "table4": Table(
        "Efficient methods, 1/9 of the vision tokens",
        "anyres9",
        {
            "fastv": System(title="FastV", projector=UNCOMPRESSED, pruning={"name": "fastv"}),
            "fastv_average": System(
                title="FastV, layer average",
                projector=UNCOMPRESSED,
                pruning={"name": "fastv", "budget": "layer_average"},
                extra=True,
            ),
            "pyramid_drop": System(title="PyramidDrop", projector=UNCOMPRESSED, pruning={"name": "pyramid_drop"}),
            "vispruner": System(title="VisPruner", projector=UNCOMPRESSED, pruning={"name": "vispruner"}),
            "deco": System(title="DeCo", projector=pool()),
            "token_packer": System(title="TokenPacker", projector={"name": "token_packer", "stride": 3}),
            "vision_remember": VISION_REMEMBER,
            "uncompressed": System(title="Uncompressed (1/1)", projector=UNCOMPRESSED, extra=True),
        },
    ),
    "table5a": Table(
        "Key components, 1/9",
        "anyres4",
        {
            "baseline": BASELINE,
            "local": System(
                title="+ local attention",
                projector=pool(),
                refusion=remember(levels=(23,), self_attention=False, text_pool="none"),
            ),
            "multi_level": System(
                title="+ multi-level fusion",
                projector=pool(),
                refusion=remember(self_attention=False, text_pool="none"),
            ),
            "bidirectional": System(title="+ bidirectional", projector=pool(), refusion=remember(text_pool="none")),
            "text_token": System(title="+ text token", projector=pool(), refusion=remember()),
        },
    ),
    "table5b": Table(
        "Interaction, 1/9",
        "anyres4",
        {
            interaction: System(
                title=interaction.capitalize(), projector=pool(), refusion=remember(interaction=interaction)
            )
            for interaction in ("global", "deformable", "local")
        },
    ),
    "table5c": Table(
        "Insertion layers, 1/9",
        "anyres4",
        {
            f"after_{'_'.join(map(str, layers))}": System(
                title=",".join(map(str, layers)), projector=pool(), refusion=remember(insert_after=layers)
            )
            for layers in ((1,), (1, 4), (1, 4, 7))
        },
    ),
}


def find_row(table: str, row: str) -> System:
    """Returns a row by its name and its table's.

    Raises:
        ConfigError: There is no such table or row; the message lists those that exist.
    """
    if table not in TABLES:
        raise ConfigError(f"no table {table!r}: expected one of {', '.join(TABLES)}")
    rows = TABLES[table].rows
    if row not in rows:
        raise ConfigError(f"{table} has no row {row!r}: expected one of {', '.join(rows)}")
    return rows[row]


def listing() -> str:
    """Returns every row with the methods that it switches on, as lines of text."""
    lines = []
    for name, table in TABLES.items():
        lines.append(f"{name}: {table.title} ({table.image})")
        for row, system in table.rows.items():
            parts = [system.projector, system.refusion, system.pruning]
            methods = " ".join(f"{part['name']}{_details(part)}" for part in parts if part is not None)
            lines.append(f"  {row:<20} {system.title:<28} {methods}{' (not in the paper)' if system.extra else ''}")
    return "\n".join(lines)


def _details(fields: Fields) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in fields.items() if name != "name")
    return f"({shown})" if shown else ""
